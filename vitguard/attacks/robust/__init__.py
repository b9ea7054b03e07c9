"""Closed forms for damaged gradients."""

from vitguard.attacks.robust.attacks import RobustPosition, RobustSpan

__all__ = ["RobustPosition", "RobustSpan"]
