"""What a malicious server knows of weights that it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor

__all__ = ["BinKind", "Bins", "Crafted"]

BinKind = Literal["mlp", "parallel", "serial", "behind", "lora", "value", "feature", "head"]


@dataclass(frozen=True, eq=False)
class Bins:
    """Rows of a trained layer whose thresholds a server put in order along one direction.

    The gradients of neighbouring rows differ by the tokens between their thresholds.

    Args:
        layer: Module name of the trained linear layer.
        rows: Its rows by ascending threshold, shape (groups, bins).
        direction: Rows of several layers that measure along the same direction have the same
            number; their thresholds go on where the layer before ends.
        places: The patch position whose tokens a group sees, shape (groups,); None where one group
            sees all.
        kind: What decides which token a row sees. `mlp`: the layer is fc1 itself. An adapter that
            reads what the MLP reads (`parallel`), or what the MLP gives (`serial`): its own first
            layer. One that reads what the attention gives (`behind`): the attention, which turns to
            the one position of `places`. The layer is A of LoRA: fc1 beside it (`lora`), or one
            attention head for each row (`value`). An adapter beside weights that the server did not
            write (`feature`): what it reads is no patch. The `head` itself, which is 0: its rows
            are no bins but classes.
        out: Module name of the layer whose columns carry the gradient back to the rows.
        even: Whether all tokens of an image have one weight, whatever their size; else LayerNorm
            divides the weight of each by its size.
        turned: Whether rows see the class token of the last block alone, which turned to `places`:
            one token of each image.
    """

    layer: str
    rows: Int[Tensor, "groups bins"]
    direction: int
    places: Int[Tensor, " groups"] | None = None
    kind: BinKind = "mlp"
    out: str = ""
    even: bool = False
    turned: bool = False


@dataclass(frozen=True)
class Crafted:
    """What a malicious server knows of the weights that it wrote, beside the weights themselves.

    Args:
        craft: Name of the craft.
        settings: Its settings, for the report.
        bins: Where it made rows that tell single tokens apart.
        unwritten: Why it found no place for bins; "" where it did, or wants none.
        nothing: Why there is nothing to read in this update, as the update itself shows; "" where
            that is not so.
    """

    craft: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    bins: tuple[Bins, ...] = ()
    unwritten: str = ""
    nothing: str = ""
