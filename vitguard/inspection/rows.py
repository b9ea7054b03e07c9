"""Rows that are nearly another row: what a craft that measures along one direction needs."""

from __future__ import annotations

import math
import secrets

import torch
from torch import Tensor

__all__ = [
    "SAMPLE",
    "SKETCH",
    "finite",
    "fresh_generator",
    "nearest",
    "regularity",
    "twin_cosines",
]

SKETCH = 48
"""Numbers of the random projection in which the nearest row is looked for."""
SAMPLE = 96
"""Rows that are drawn where there are more: a share of a tenth is then known up to 0.03."""
_WINDOW = 16


def fresh_generator() -> torch.Generator:
    """Return a generator that nobody can foresee: the adversary must not know the projection."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def finite(tensor: Tensor) -> bool:
    """Whether all values are numbers: a sum hands on what is not, and may be too large itself."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def nearest(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return indices of rows, and for each the index of the other row that is most parallel to it.

    Of many rows `SAMPLE` are drawn. Rows wider than `SKETCH` are compared in a random projection to
    so many numbers: of rows that are near parallel one is found, of others any.

    Args:
        rows: Shape (rows, columns), at least 2 rows.
    """
    if rows.shape[1] > SKETCH:
        sketch = torch.randn(SKETCH, rows.shape[1], generator=generator).to(rows)
        rows = rows @ sketch.T
    units = torch.nn.functional.normalize(rows, dim=1)
    drawn = torch.randperm(len(rows), generator=generator)[:SAMPLE].sort().values.to(rows.device)
    alike = (units[drawn] @ units.T).abs_()
    alike.scatter_(1, drawn[:, None], -1)
    return drawn, alike.argmax(1)


def twin_cosines(rows: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Return |cosine| of rows (all, or a sample of many) with the most parallel other row.

    A row of zeros has 0.

    Args:
        rows: Shape (rows, columns).
        lengths: Of the rows, shape (rows,).
    """
    if len(rows) < 2:
        return rows.new_zeros(len(rows))
    drawn, other = nearest(rows, generator)
    lengths = lengths.clamp_min(1e-8)
    products = (rows[drawn] * rows[other]).sum(1)
    return products.div_(lengths[drawn]).div_(lengths[other]).abs_()


def regularity(values: Tensor) -> float:
    """Return how evenly sorted values follow each other: 1 by chance, large for a ruler.

    The gaps between sorted draws of any smooth distribution vary locally as much as they are wide
    (variance = mean^2); those between quantiles do not. Without two different values it is 0.

    Args:
        values: Shape (values,).
    """
    gaps = values.double().sort().values.diff()
    if len(gaps) < 2 * _WINDOW or not bool(gaps.any()):
        return 0.0
    windows = gaps[: len(gaps) // _WINDOW * _WINDOW].view(-1, _WINDOW)
    means = windows.mean(1)
    spread = windows.var(1) / means.square()
    # values of coarse precision: a window of ties says nothing
    spread = spread[means > 0]
    if not len(spread):
        return 0.0
    return float(1 / spread.median().clamp_min(1e-9))
