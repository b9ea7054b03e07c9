"""Directions that tell one position from all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.errors import NotApplicable

__all__ = ["Gates", "told_apart"]

_RIDGES = (1e-6, 1e-4, 1e-2, 1.0, 1e2)
_LEAST = 1e-4  # distance of a position from the others, relative to their size


@dataclass(frozen=True)
class Gates:
    """One direction for each position, along which it stands one unit before every other.

    Args:
        rows: The directions, shape (positions, width).
        own: Where each position stands along its own, shape (positions,).
        distance: Of the position that is closest to the others, along its unit direction.
    """

    rows: Float[Tensor, "positions width"]
    own: Float[Tensor, " positions"]
    distance: float

    @staticmethod
    def of(positions: Float[Tensor, "positions width"], *kept: Tensor) -> Gates:
        """Return the gates of positions (each with mean zero over its channels).

        Args:
            kept: Orthonormal directions of the token that no gate may look at, shape (width,).

        Raises:
            NotApplicable: No linear direction tells some position from the others.
        """
        centred = positions - positions.mean(0)
        gram = centred @ centred.T
        size = float(gram.diagonal().mean())
        best: Gates | None = None
        for ridge in _RIDGES if size > 0 and len(positions) > 1 else ():
            eye = ridge * size * torch.eye(len(gram), dtype=gram.dtype)
            rows = torch.linalg.solve(gram + eye, centred)
            for direction in kept:
                rows = rows - (rows @ direction)[:, None] * direction
            rows = torch.nn.functional.normalize(rows)
            found = rows @ positions.T
            own = found.diagonal().clone()
            found.fill_diagonal_(-torch.inf)
            ahead = own - found.max(1).values
            distance = float(ahead.min())
            if distance > (best.distance if best else _LEAST * size**0.5):
                best = Gates(rows / ahead[:, None], own / ahead, distance)
        if best is None:
            raise NotApplicable("the positions are too alike to tell them apart: gated=false")
        return best


def told_apart(positions: Float[Tensor, "positions width"]) -> bool:
    """Whether a linear direction tells each position from the others."""
    try:
        Gates.of(positions)
    except NotApplicable:
        return False
    return True
