"""What the adversary is granted."""

from vitguard.threats.curious_server import CuriousServer, Threat

__all__ = ["CuriousServer", "Threat"]
