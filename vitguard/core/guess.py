"""What an attack returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["AffineSpace", "Guess"]


@dataclass(frozen=True)
class AffineSpace:
    """Per-patch affine spaces in model-input units: x_i = origin_i + basis_i v.

    Args:
        origin: Shape (patches, pixels per patch).
        basis: Shape (patches, pixels per patch, directions), or (pixels, directions) shared by all.
    """

    origin: Float[Tensor, "patches pixels"]
    basis: Tensor


@dataclass(frozen=True)
class Guess:
    """What an attack returns.

    Args:
        images: Pixels in [0, 1], shape (guessed, channels, height, width). One image may stand
            for a whole batch; none (guessed = 0) says that only labels were recovered.
        labels: Shape (batch,). With one image per label they are in the order of the images, where
            the attack can tell the order.
        verified: Shape (guessed, patches): patches that the attack itself proved to be right. Of
            an incomplete batch, right for one of its images at that position.
        shuffled: Shape (guessed, patches): positions the attack found to be shuffled.
        space: What is known exactly where the image is not.
        others: Images that parts of the attack made and that it did not choose, by the part's name.
            An audit knows the truth: where one of them leaks, nothing has resisted.
        fitted: Whether the images were fitted to the update, so that reproducing it proves nothing.
        details: Plain facts for the report (rung, residual, rank); JSON values only. A non-empty
            `unfinished` names what a budget left out: nothing has resisted then.
    """

    images: Float[Tensor, "guessed channels height width"]
    labels: Int[Tensor, " batch"] | None = None
    verified: Bool[Tensor, "guessed patches"] | None = None
    shuffled: Bool[Tensor, "guessed patches"] | None = None
    space: AffineSpace | None = None
    fitted: bool = False
    others: Mapping[str, Tensor] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
