"""The ladder: every exact attack, the cheapest first."""

from vitguard.attacks.ladder.attack import Ladder

__all__ = ["Ladder"]
