"""Reading the tokens that a malicious server's bins tell apart."""

from vitguard.attacks.imprint.attack import ImprintReading

__all__ = ["ImprintReading"]
