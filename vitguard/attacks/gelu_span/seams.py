"""Where do loose patches go? Neighbouring patches of a photo continue each other at their seams."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitguard.vit import Anatomy

__all__ = ["place_by_seams", "seam_energy"]

_SIDES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # above, below, left, right


def place_by_seams(
    anatomy: Anatomy,
    patches: Float[Tensor, "patches pixels"],
    fixed: Bool[Tensor, " patches"],
    loose: Float[Tensor, "loose pixels"],
    generator: torch.Generator,
    *,
    sweeps: int = 12,
    restarts: int = 6,
) -> tuple[Float[Tensor, "patches pixels"], Bool[Tensor, " patches"]]:
    """Assign loose patches to positions that are not fixed so that seams jump least.

    Returns the patches, and which positions were filled.

    Each sweep solves a linear assignment in which every open position's neighbours are what the
    last sweep put there. The best of a few random restarts is kept. The order is a guess: the
    gradient does not contain it.
    """
    from scipy.optimize import linear_sum_assignment

    # The assignment runs on the CPU.
    image, known = patches.cpu().clone(), fixed.cpu()
    pieces, holes = loose.cpu(), torch.nonzero(~fixed.cpu())[:, 0]
    pieces = pieces[: len(holes)]
    if not len(holes) or not len(pieces):
        return patches, torch.zeros_like(fixed)
    best, best_energy = (image, known), float("inf")
    for restart in range(restarts):
        trial, placed = image.clone(), known.clone()
        if restart:
            order = torch.randperm(len(holes), generator=generator)[: len(pieces)]
            trial[holes[order]], placed[holes[order]] = pieces, True
        for _ in range(sweeps):
            row, column = linear_sum_assignment(_costs(anatomy, trial, placed, holes, pieces))
            settled = torch.equal(trial[holes[row]], pieces[column])
            # anew: with fewer pieces than holes, a piece that moves would stay where it was as well
            trial, placed = image.clone(), known.clone()
            trial[holes[row]], placed[holes[row]] = pieces[column], True
            if settled:
                break
        energy = seam_energy(anatomy, trial)
        if energy < best_energy:
            best, best_energy = (trial, placed), energy
    return best[0].to(patches.device), (best[1] & ~known).to(fixed.device)


def seam_energy(anatomy: Anatomy, patches: Float[Tensor, "patches pixels"]) -> float:
    """Return the sum of squared jumps across all seams."""
    rows, columns = anatomy.grid
    edges = _edges(anatomy, patches).unflatten(1, (rows, columns))
    down = (edges[1, :-1] - edges[0, 1:]).square().sum()
    across = (edges[3, :, :-1] - edges[2, :, 1:]).square().sum()
    return float(down + across)


def _edges(anatomy: Anatomy, patches: Tensor) -> Tensor:
    """Edge pixels of each patch, extrapolated half a pixel outwards: (side, patches, values)."""
    height, width = anatomy.patch_size
    cut = patches.reshape(-1, anatomy.channels, height, width)
    pairs = (
        (cut[:, :, 0], cut[:, :, min(1, height - 1)]),
        (cut[:, :, -1], cut[:, :, max(height - 2, 0)]),
        (cut[:, :, :, 0], cut[:, :, :, min(1, width - 1)]),
        (cut[:, :, :, -1], cut[:, :, :, max(width - 2, 0)]),
    )
    long = max(anatomy.channels * height, anatomy.channels * width)
    out = patches.new_zeros(4, len(patches), long)
    for side, (edge, inner) in enumerate(pairs):
        values = (edge + 0.5 * (edge - inner)).flatten(1)
        out[side, :, : values.shape[1]] = values
    return out


def _costs(
    anatomy: Anatomy, image: Tensor, placed: Tensor, holes: Tensor, pieces: Tensor
) -> np.ndarray:
    rows, columns = anatomy.grid
    own, there = _edges(anatomy, pieces), _edges(anatomy, image)
    cost = torch.zeros(len(holes), len(pieces), dtype=image.dtype)
    for index, hole in enumerate(holes.tolist()):
        for side, (down, across) in enumerate(_SIDES):
            row, column = hole // columns + down, hole % columns + across
            if not (0 <= row < rows and 0 <= column < columns):
                continue
            neighbour = row * columns + column
            if bool(placed[neighbour]):
                jump = own[side] - there[side ^ 1, neighbour]
                cost[index] += jump.square().sum(1)
    return cost.numpy()
