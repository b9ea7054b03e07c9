"""What a malicious server knows of weights that it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor

__all__ = ["Bins", "Crafted"]


@dataclass(frozen=True, eq=False)
class Bins:
    """Rows of a linear layer whose thresholds a server put in order along one direction.

    The gradients of neighbouring rows differ by the tokens between their thresholds.

    Args:
        layer: Module name of the linear layer.
        rows: Its rows by ascending threshold, shape (groups, bins). With one group for each patch
            position, a group sees the tokens of its position only; one group alone sees all.
        direction: Rows of several layers that measure along the same direction have the same
            number; their thresholds go on where the layer before ends.
    """

    layer: str
    rows: Int[Tensor, "groups bins"]
    direction: int


@dataclass(frozen=True)
class Crafted:
    """What a malicious server knows of the weights that it wrote, beside the weights themselves.

    Args:
        craft: Name of the craft.
        settings: Its settings, for the report.
        bins: Where it made rows that tell single tokens apart.
        nothing: Why there is nothing to read in this update, as the update itself shows; "" where
            that is not so.
    """

    craft: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    bins: tuple[Bins, ...] = ()
    nothing: str = ""
