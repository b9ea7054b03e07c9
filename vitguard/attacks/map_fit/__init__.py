"""Maximum a posteriori over the whole update, for damaged gradients."""

from vitguard.attacks.map_fit.attack import MaximumAPosteriori

__all__ = ["MaximumAPosteriori"]
