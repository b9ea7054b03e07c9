"""Containment: low-rank updates still say where the inputs of every layer lie."""

from vitguard.attacks.containment.attack import Containment

__all__ = ["Containment"]
