"""GELU-span inversion: the MLP closes what linear spans leave open."""

from vitguard.attacks.gelu_span.attack import GeluSpan

__all__ = ["GeluSpan"]
