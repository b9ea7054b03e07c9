"""What a malicious server can write into a model: one file for each craft."""

from vitguard.threats.crafts.base import Craft

__all__ = ["Craft"]
