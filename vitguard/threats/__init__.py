"""What the adversary is granted."""

from vitguard.threats.curious_server import CuriousServer, Threat
from vitguard.threats.malicious_server import MaliciousServer, parse_threat

__all__ = ["CuriousServer", "MaliciousServer", "Threat", "parse_threat"]
