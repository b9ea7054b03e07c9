"""Which positions a shuffle moved: what the settings say, and what residuals show."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.core import View
from vitguard.vit import Anatomy

__all__ = ["shuffled_count", "shuffled_positions"]

_FITS = 1e-3
"""A residual below it is rounding, whatever gaps there are; shuffled positions miss by tenths."""


def shuffled_positions(
    residual: Float[Tensor, " patches"], at_most: int | None = None, *, exactly: bool = False
) -> Tensor:
    """Return which positions do not fit their own offset: the mask of a shuffle.

    True positions fit to rounding and shuffled ones do not, so the logarithms of the residuals
    fall into two groups; without a gap of a factor 10 between them nothing is called shuffled.

    Args:
        residual: Of each position under its own offset, as a share of it.
        at_most: How many the settings allow; then a gap of a factor 1.5 is enough.
        exactly: The settings say that it is just as many: the largest residuals are taken.
    """
    patches = len(residual)
    order = residual.clamp_min(1e-300).log10().sort().values
    at_most = patches if at_most is None else min(at_most, patches)
    if patches < 2 or at_most == 0:
        return torch.zeros_like(residual, dtype=torch.bool)
    if exactly:
        found = torch.zeros_like(residual, dtype=torch.bool)
        found[residual.topk(at_most).indices] = True
        return found
    gaps = order.diff()[patches - 1 - at_most if at_most < patches else 0 :]
    widest = int(gaps.argmax()) + (len(order) - 1 - len(gaps))
    if order.diff()[widest] < (1 if at_most == patches else 0.18):
        return torch.full_like(residual, bool(order.median() > -2), dtype=torch.bool)
    threshold = (order[widest] + order[widest + 1]) / 2
    return (residual.clamp_min(1e-300).log10() > threshold) & (residual > _FITS)


def shuffled_count(view: View, anatomy: Anatomy) -> tuple[int, bool]:
    """Return how many positions of one image are shuffled at most, and whether exactly."""
    shuffle = view.traits.shuffle
    if shuffle is None:
        return anatomy.patches, False
    return shuffle.most, shuffle.exactly and view.update.batch_size == 1
