"""The grid of image files: pixels stored with eight bits are multiples of 1/255."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["LEVELS", "ON_GRID", "ROUNDED", "nearest_levels"]

LEVELS = 255
ON_GRID = 0.15  # levels; 48 pixels off the grid have 0.29 with a deviation of 0.02
ROUNDED = "rounded to the grid of image files"


def nearest_levels(
    patches: Float[Tensor, "patches pixels"], levels: int = LEVELS
) -> tuple[Float[Tensor, "patches pixels"], Float[Tensor, " patches"]]:
    """Return the nearest values on the grid, and how far each patch is from them.

    The distance is a root mean square in levels: 0.29 where nothing is known, and below `ON_GRID`
    where the patch came from an image file. It is a hint. That the rounded image explains the
    update is the proof, and the caller's to ask.

    Args:
        patches: Pixels in [0, 1].
        levels: Grey levels above zero.
    """
    scaled = patches * levels
    near = scaled.round()
    return near / levels, (scaled - near).square().mean(1).sqrt()
