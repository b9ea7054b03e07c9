"""Magnitude pruning of the update: a baseline without a guarantee."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vitguard.core import Traits, Update
from vitguard.defenses.base import Draws, UpdateDefense
from vitguard.defenses.sealing import require_finite
from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["GradientPruning"]


@dataclass(frozen=True)
class GradientPruning(UpdateDefense):
    """Keep the largest fraction of each tensor's entries and zero the others.

    Guarantees:
        None: which entries survive depends on the data, and they survive exactly.

    Args:
        keep: Fraction of the entries of each tensor to keep, above 0 and at most 1; at least one
            entry of each tensor stays.

    References:
        arXiv 1906.08935, section 5.
    """

    name: ClassVar[str] = "pruning"
    keep: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise expected("keep above 0 and at most 1", self.keep)

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return that entries are missing, where any are zeroed."""
        whole = self.keep == 1
        return replace(before, exact=before.exact and whole, sparse=before.sparse or not whole)

    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return all but the largest entries of each tensor zeroed; counters (integers) stay.

        Raises:
            InputError: An entry is not finite.
        """
        require_finite(update)
        tensors = {
            n: self._pruned(t) if t.is_floating_point() and t.numel() else t
            for n, t in update.tensors.items()
        }
        return replace(update, tensors=tensors)

    def mimic(self, dummy: Mapping[str, Tensor], seen: Update) -> dict[str, Tensor]:
        """Keep the entries that the victim kept: the update itself shows them."""
        return {n: self._masked(t, seen.tensors.get(n)) for n, t in dummy.items()}

    def _masked(self, dummy: Tensor, seen: Tensor | None) -> Tensor:
        if seen is not None:
            kept = seen != 0
            if int(kept.sum()) <= self._count(dummy):
                return dummy * kept
        return self._pruned(dummy)  # sealed, or noise came after: which entries is not visible

    def _count(self, tensor: Tensor) -> int:
        return max(1, round(self.keep * tensor.numel()))

    def _pruned(self, tensor: Tensor) -> Tensor:
        flat = tensor.flatten()
        count = self._count(flat)
        if count >= flat.numel():
            return tensor
        kept = flat.abs().topk(count).indices
        return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)
