"""Secret draws of a patch shuffle: masks and permutations, each example's from its own key.

Every draw is a function of the example's key alone (a counter-based generator), so it depends
neither on the pixels nor on who else is in the batch, and a whole batch is drawn at once.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "block_masks",
    "draw_keys",
    "keyed_uniform",
    "permute_inside",
    "uniform_masks",
]

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, the increment of splitmix64
_MIX1, _MIX2 = -4658895280553007687, -7723592293110705685
_STREAM = 1 << 32  # numbers of one purpose; the next purpose starts behind them
_ATTEMPTS = 10
_ASPECT = 0.3  # BEiT: rectangles between 0.3 and 1 / 0.3 times as high as wide
_SMALLEST = 16 / 196  # BEiT: at least 16 of 196 patches in a rectangle


def draw_keys(batch: int, generator: torch.Generator) -> Int[Tensor, " batch"]:
    """Return one key for each example."""
    high = torch.iinfo(torch.int64).max
    return torch.randint(high, (batch,), generator=generator, device=generator.device).cpu()


def keyed_uniform(
    keys: Int[Tensor, " batch"], count: int, *, stream: int
) -> Float[Tensor, "batch count"]:
    """Return `count` numbers in [0, 1) for each key, float64; other streams, other numbers.

    References:
        splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    counter = torch.arange(1 + stream * _STREAM, 1 + stream * _STREAM + count)
    state = _mixed(keys)[:, None] + counter * _GOLDEN
    return _shifted(_mixed(state), 11).to(torch.float64) * 2.0**-53


def _mixed(state: Tensor) -> Tensor:
    state = (state ^ _shifted(state, 30)) * _MIX1
    state = (state ^ _shifted(state, 27)) * _MIX2
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign, which int64 would do."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def uniform_masks(
    keys: Int[Tensor, " batch"], patches: int, count: int
) -> Bool[Tensor, "batch patches"]:
    """Return masks of exactly `count` patches, each set equally likely."""
    order = keyed_uniform(keys, patches, stream=0).argsort(dim=1)
    mask = torch.zeros(len(keys), patches, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], True)


def block_masks(
    keys: Int[Tensor, " batch"], grid: tuple[int, int], count: int
) -> Bool[Tensor, "batch patches"]:
    """Return BEiT's block-wise masks of at most `count` patches: unions of random rectangles.

    Rectangles of 8 % of the patches or more (as far as `count` allows) and an aspect between 0.3
    and 1 / 0.3 are added until none of ten proposals fits into what is left.

    References:
        arXiv 2106.08254, algorithm 1.
    """
    rows, columns = grid
    mask = torch.zeros(len(keys), rows, columns, dtype=torch.bool)
    open_ = torch.full((len(keys),), count > 0)
    round_ = 0
    while bool(open_.any()):
        active = open_.nonzero().flatten()
        left = count - mask[active].flatten(1).sum(1)
        proposed = _rectangles(keys[active], grid, left, stream=1 + round_)
        new = (proposed & ~mask[active, None]).flatten(2).sum(2)
        fits = (new > 0) & (new <= left[:, None])
        first = fits.to(torch.uint8).argmax(dim=1)
        chosen = proposed[torch.arange(len(active)), first] & fits.any(1)[:, None, None]
        mask[active] |= chosen
        open_[active] = fits.any(1) & (left > new[torch.arange(len(active)), first])
        round_ += 1
    return mask.flatten(1)


def _rectangles(
    keys: Tensor, grid: tuple[int, int], left: Int[Tensor, " batch"], *, stream: int
) -> Bool[Tensor, "batch attempts rows columns"]:
    """Propose rectangles of at most `left` patches in area, before rounding."""
    rows, columns = grid
    area, aspect, top, side = keyed_uniform(keys, 4 * _ATTEMPTS, stream=stream).chunk(4, dim=1)
    smallest = left.clamp(max=max(1, round(_SMALLEST * rows * columns)))[:, None]
    area = smallest + area * (left[:, None] - smallest)
    ratio = _ASPECT ** (1 - 2 * aspect)
    high = (area * ratio).sqrt().round().clamp(1, rows)
    wide = (area / ratio).sqrt().round().clamp(1, columns)
    top = (top * (rows - high + 1)).floor()
    side = (side * (columns - wide + 1)).floor()
    return _between(top, high, rows)[..., :, None] & _between(side, wide, columns)[..., None, :]


def _between(start: Tensor, length: Tensor, size: int) -> Tensor:
    index = torch.arange(size)
    return (index >= start[..., None]) & (index < (start + length)[..., None])


def permute_inside(
    keys: Int[Tensor, " batch"], mask: Bool[Tensor, "batch patches"], *, derangement: bool = False
) -> Int[Tensor, "batch patches"]:
    """Return for each slot the patch that goes there: a permutation inside the mask.

    Args:
        derangement: Draw a single cycle through the mask, so that no patch stays (a mask of one
            patch keeps it). Otherwise every permutation is equally likely.
    """
    batch, patches = mask.shape
    slots = torch.arange(patches).expand(batch, patches)
    inside = mask.sum(1, keepdim=True)
    # masked slots first, once in their own order and once in random order
    shuffled = (keyed_uniform(keys, patches, stream=-1) + (~mask) * 2).argsort(dim=1)
    if derangement:
        following = torch.where(slots + 1 < inside, slots + 1, torch.zeros_like(slots))
        target, taken = shuffled, shuffled.gather(1, following)
    else:
        target, taken = (~mask).to(torch.uint8).argsort(dim=1, stable=True), shuffled
    taken = torch.where(slots < inside, taken, target)
    return torch.empty_like(slots).scatter_(1, target, taken)
