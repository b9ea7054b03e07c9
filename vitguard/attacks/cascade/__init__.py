"""Cascade: labels and per-sample gradients of a batch, from the last block."""

from vitguard.attacks.cascade.attack import Cascade, Samples, last_block_samples

__all__ = ["Cascade", "Samples", "last_block_samples"]
