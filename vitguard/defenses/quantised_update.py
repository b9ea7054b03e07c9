"""Quantised update: few levels for each tensor, rounded at random so that the mean is right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vitguard.core import Traits, Update
from vitguard.defenses.base import Draws, UpdateDefense
from vitguard.defenses.sealing import require_finite
from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["QuantisedUpdate"]


@dataclass(frozen=True)
class QuantisedUpdate(UpdateDefense):
    """Round each entry to one of 2^bits - 1 levels up to the largest of its tensor.

    Guarantees:
        Every entry of a tensor that leaves is one of 2^bits - 1 levels, up to rounding of the
        tensor's type. A tensor with entries that are not finite is refused.

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
        """Return the rounded tensors; counters (integers) stay.

        Raises:
            InputError: An entry is not finite, of which there are no levels.
        """
        require_finite(update)
        tensors = {
            n: self._rounded(t, draws) if t.is_floating_point() and t.numel() else t
            for n, t in update.tensors.items()
        }
        return replace(update, tensors=tensors)

    def _rounded(self, tensor: Tensor, draws: Draws) -> Tensor:
        wide = tensor.detach().to("cpu", torch.float64)  # narrower, a sum may pass the top level
        largest, top = wide.abs().max(), 2 ** (self.bits - 1) - 1
        step = largest / top
        if not bool(step > 0):  # also where it underflows: what is left is no level
            return torch.zeros_like(tensor)
        level = wide / step
        if self.stochastic:
            up = torch.from_numpy(draws.uniform(tensor.numel())).reshape(tensor.shape)
            level = (level + up).floor()
        else:
            level = level.round()
        return (level.clamp(-top, top) * step).clamp(-largest, largest).to(tensor)
