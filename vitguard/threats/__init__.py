"""What the adversary is granted."""

from vitguard.threats.curious_server import CuriousServer

__all__ = ["CuriousServer"]
