"""Span inversion: closed form for fixed positions."""

from vitguard.attacks.span.attack import SpanInversion

__all__ = ["SpanInversion"]
