"""Secret draws of a patch shuffle: masks and permutations, each example's from its own key.

Every draw is a function of the example's key alone under the source's secret key (`Draws.keyed`),
so it depends neither on the pixels nor on who else is in the batch, and a whole batch is drawn at
once. NumPy computes them: on arrays this small torch's threads would cost more than the work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from vitguard.draws import Draws

__all__ = [
    "block_masks",
    "chosen",
    "permute_inside",
    "uniform_masks",
]

_ATTEMPTS = 10
_ASPECT = 0.3  # BEiT: rectangles between 0.3 and 1 / 0.3 times as high as wide
_SMALLEST = 16 / 196  # BEiT: at least 16 of 196 patches in a rectangle
# numbers of one purpose; rectangles use one stream a round, from 3 on
_CHOICE, _ORDER, _CHANCE, _RECTANGLES = range(4)

Array = NDArray[Any]


def chosen(draws: Draws, keys: Tensor, probability: float) -> Bool[Tensor, "batch 1"]:
    """Return which examples are shuffled at all."""
    return torch.from_numpy(draws.keyed(keys, 1, stream=_CHANCE) < probability)


def uniform_masks(
    draws: Draws, keys: Int[Tensor, " batch"], patches: int, count: int
) -> Bool[Tensor, "batch patches"]:
    """Return masks of exactly `count` patches, each set equally likely."""
    order = draws.keyed(keys, patches, stream=_CHOICE).argsort(axis=1)
    mask = np.zeros((len(keys), patches), dtype=bool)
    np.put_along_axis(mask, order[:, :count], True, axis=1)
    return torch.from_numpy(mask)


def block_masks(
    draws: Draws, keys: Int[Tensor, " batch"], grid: tuple[int, int], count: int
) -> Bool[Tensor, "batch patches"]:
    """Return BEiT's block-wise masks of at most `count` patches: unions of random rectangles.

    Rectangles of 8 % of the patches or more (as far as `count` allows) and an aspect between 0.3
    and 1 / 0.3 are added until none of ten proposals fits into what is left.

    References:
        arXiv 2106.08254, algorithm 1.
    """
    mask = np.zeros((len(keys), *grid), dtype=bool)
    active = np.arange(len(keys) if count else 0)
    stream = _RECTANGLES
    while len(active):
        left = count - mask[active].sum((1, 2))
        proposed = _rectangles(draws, keys[torch.from_numpy(active)], grid, left, stream=stream)
        new = (proposed & ~mask[active, None]).sum((2, 3))
        fits = (new > 0) & (new <= left[:, None])
        first = fits.argmax(axis=1)
        rows = np.arange(len(active))
        some = fits.any(axis=1)
        mask[active] |= proposed[rows, first] & some[:, None, None]
        active = active[some & (left > new[rows, first])]
        stream += 1
    return torch.from_numpy(mask.reshape(len(keys), grid[0] * grid[1]))


def _rectangles(
    draws: Draws, keys: Tensor, grid: tuple[int, int], left: Array, *, stream: int
) -> Bool[NDArray, "batch attempts rows columns"]:
    """Propose rectangles of at most `left` patches in area, before rounding."""
    rows, columns = grid
    numbers = draws.keyed(keys, 4 * _ATTEMPTS, stream=stream)
    area, aspect, top, side = np.split(numbers, 4, axis=1)
    smallest = np.minimum(left, max(1, round(_SMALLEST * rows * columns)))[:, None]
    area = smallest + area * (left[:, None] - smallest)
    ratio = _ASPECT ** (1 - 2 * aspect)
    high = np.sqrt(area * ratio).round().clip(1, rows)
    wide = np.sqrt(area / ratio).round().clip(1, columns)
    top = np.floor(top * (rows - high + 1))
    side = np.floor(side * (columns - wide + 1))
    return _between(top, high, rows)[..., :, None] & _between(side, wide, columns)[..., None, :]


def _between(start: Array, length: Array, size: int) -> Array:
    index = np.arange(size)
    return (index >= start[..., None]) & (index < (start + length)[..., None])


def permute_inside(
    draws: Draws,
    keys: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch patches"],
    *,
    derangement: bool = False,
) -> Int[Tensor, "batch patches"]:
    """Return for each slot the patch that goes there: a permutation inside the mask.

    Args:
        derangement: Draw a single cycle through the mask, so that no patch stays (a mask of one
            patch keeps it). Otherwise every permutation is equally likely.
    """
    outside = ~mask.numpy()
    slots = np.broadcast_to(np.arange(outside.shape[1]), outside.shape)
    inside = (~outside).sum(axis=1, keepdims=True)
    # masked slots first, once in random order and once in their own
    shuffled = (draws.keyed(keys, outside.shape[1], stream=_ORDER) + 2 * outside).argsort(axis=1)
    if derangement:
        following = np.where(slots + 1 < inside, slots + 1, 0)
        target, taken = shuffled, np.take_along_axis(shuffled, following, axis=1)
    else:
        target, taken = outside.argsort(axis=1, kind="stable"), shuffled
    source = np.empty_like(target)
    np.put_along_axis(source, target, np.where(slots < inside, taken, target), axis=1)
    return torch.from_numpy(source)
