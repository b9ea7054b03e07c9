"""Gradient matching: one loop for many papers."""

from vitguard.attacks.matching.attack import MatchingAttack

__all__ = ["MatchingAttack"]
