"""The true images with which a running attack is compared."""

from __future__ import annotations

from torch import Tensor

from vitguard.errors import expected
from vitguard.metrics import Scores, score

__all__ = ["check_same", "check_truth", "scored"]


def check_truth(truth: Tensor | None) -> None:
    if truth is None:
        return
    shaped = truth.dim() == 4 and truth.shape[1] in (1, 3) and truth.numel()
    if not shaped or not truth.is_floating_point():
        raise expected(
            "truth as floating pixels of shape (batch, 1 or 3, height, width)",
            f"{truth.dtype} of shape {tuple(truth.shape)}",
        )
    low, high = (float(value) for value in truth.detach().aminmax())
    if not (low > -0.01 and high < 1.01):  # resizing oversteps a little; normalised input by far
        raise expected("truth as pixels in [0, 1]", f"[{low:.3g}, {high:.3g}]")


def check_same(images: Tensor, truth: Tensor) -> None:
    if images.shape != truth.shape:
        raise expected(
            f"truth of the images that are attacked, shape {tuple(images.shape)}",
            tuple(truth.shape),
        )


def scored(images: Tensor, truth: Tensor, patch_size: tuple[int, int] | None) -> Scores:
    check_same(images, truth)
    height, width = images.shape[-2:]
    return score(images, truth, patch_size or (height, width))
