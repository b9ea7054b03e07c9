"""Gaussian noise on the update: a baseline without a guarantee."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vitguard.core import Traits, Update
from vitguard.defenses.base import Draws, UpdateDefense
from vitguard.defenses.sealing import require_finite
from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["GradientNoise"]


@dataclass(frozen=True)
class GradientNoise(UpdateDefense):
    """Add Gaussian noise to each tensor, relative to its root mean square.

    Guarantees:
        None. Without clipping there is no epsilon; use `privacy` for one.

    Args:
        scale: Standard deviation of the noise over the tensor's root mean square, at least 0.
        keep_statistics: Shift and rescale each noised tensor to its original mean and norm about
            the mean.
    """

    name: ClassVar[str] = "noise"
    scale: float = 0.01
    keep_statistics: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise expected("a finite noise scale of at least 0", self.scale)

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return how strong the noise is, and that tensors are not exact where there is some."""
        exact, noise = before.exact and self.scale == 0, math.hypot(before.noise, self.scale)
        rank = before.rank if self.scale == 0 else 0
        rescaled = before.rescaled or (self.keep_statistics and self.scale > 0)
        return replace(before, exact=exact, noise=noise, rank=rank, rescaled=rescaled)

    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return the update with noise on every readable tensor; counters (integers) stay.

        Raises:
            InputError: An entry is not finite.
        """
        require_finite(update)
        tensors = {
            name: self._noised(t, draws) if t.is_floating_point() and t.numel() else t
            for name, t in update.tensors.items()
        }
        return replace(update, tensors=tensors)

    def _noised(self, tensor: Tensor, draws: Draws) -> Tensor:
        wide = tensor.double()  # narrower, squares of small entries are zero, and so is the noise
        noise = draws.normal(tensor.shape, like=wide)
        noised = wide + self.scale * wide.square().mean().sqrt() * noise
        if not self.keep_statistics or tensor.numel() < 2:
            return noised.to(tensor.dtype)
        about = noised - noised.mean()
        original = wide - wide.mean()
        ratio = original.norm() / about.norm().clamp_min(torch.finfo(wide.dtype).tiny)
        return (wide.mean() + about * ratio).to(tensor.dtype)
