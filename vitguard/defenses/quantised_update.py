"""Quantised update: few levels for each tensor, rounded at random so that the mean is right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vitguard.core import Traits, Update
from vitguard.defenses.base import Draws, UpdateDefense
from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["QuantisedUpdate"]


@dataclass(frozen=True)
class QuantisedUpdate(UpdateDefense):
    """Round each entry to one of 2^bits - 1 levels up to the largest of its tensor.

    Guarantees:
        Every entry of a tensor that leaves is one of 2^bits - 1 levels.

    Does not protect against:
        Exact attacks at 8 bits, which lose some dB to the rounding (28 dB and more are left), and
        fitting images to what is sent (`map`). Few levels send few bits of each entry, but there
        are millions of entries.

    Args:
        bits: Of each entry, 2 to 16; 2 bits are -1, 0 and 1 times the largest.
        stochastic: Round up with the chance that makes the mean right, else to the nearest level.

    References:
        Alistarh et al., arXiv:1610.02132 (QSGD); Wen et al., arXiv:1705.07878 (TernGrad).
    """

    name: ClassVar[str] = "quantised-update"
    bits: int = 4
    stochastic: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise expected("2 to 16 bits", self.bits)

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return that tensors are not exact, of any rank, and that small entries become zero."""
        return replace(before, exact=False, sparse=True, rank=0)

    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return the rounded tensors; counters (integers) stay."""
        tensors = {
            n: self._rounded(t, draws) if t.is_floating_point() and t.numel() else t
            for n, t in update.tensors.items()
        }
        return replace(update, tensors=tensors)

    def _rounded(self, tensor: Tensor, draws: Draws) -> Tensor:
        step = tensor.abs().max() / (2 ** (self.bits - 1) - 1)
        if not bool(step > 0) or not bool(step.isfinite()):
            return tensor
        level = tensor / step
        if not self.stochastic:
            return level.round() * step
        up = torch.from_numpy(draws.uniform(tensor.numel())).reshape(tensor.shape)
        return (level + up.to(level)).floor() * step
