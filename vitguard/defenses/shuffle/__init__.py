"""Masked patch shuffle."""

from vitguard.defenses.shuffle.defense import PatchShuffle

__all__ = ["PatchShuffle"]
