"""Masked patch shuffle."""

from vitguard.defenses.shuffle.settings import PatchShuffle

__all__ = ["PatchShuffle"]
