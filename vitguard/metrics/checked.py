"""Pixels that can be scored, their patches, and decibels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from vitguard.errors import expected

__all__ = [
    "PSNR_CAP",
    "Decoys",
    "Guesses",
    "Images",
    "PerImage",
    "Perceptual",
    "Uninformed",
    "checked",
    "decibels",
    "matched_mse",
    "nearest_mse",
    "patches_of",
    "same_shape",
]

PSNR_CAP = 200.0
"""Decibels at which PSNR stops: a mean squared error of 1e-20, below what float64 pixels carry."""
Images = Float[Tensor, "batch channels height width"]
Guesses = Float[Tensor, "guesses channels height width"]
Decoys = Float[Tensor, "decoys channels height width"]
Uninformed = Float[Tensor, "uninformed channels height width"]
PerImage = Float[Tensor, " batch"]
Perceptual = Callable[[Tensor, Tensor], Tensor]


def checked(images: Tensor, name: str, *, strict: bool = False) -> Tensor:
    if images.ndim != 4 or not all(images.shape) or not images.is_floating_point():
        raise expected(
            f"{name} as floating pixels of shape (batch, channels, height, width)",
            f"{images.dtype} of shape {tuple(images.shape)}",
        )
    images = images.detach().to("cpu", torch.float64)
    if not images.isfinite().all():
        raise expected(f"finite pixels in {name}", "NaN or infinity")
    low, high = float(images.min()), float(images.max())
    if strict and not (low >= -1e-3 and high <= 1 + 1e-3):
        raise expected(
            f"{name} with pixels in [0, 1]",
            f"[{low:.3g}, {high:.3g}]",
            "Undo the model's normalisation first.",
        )
    return images.clamp(0, 1)


def same_shape(images: Tensor, truth: Tensor, name: str) -> None:
    if images.shape[1:] != truth.shape[1:]:
        raise expected(f"{name} of shape {tuple(truth.shape[1:])}", tuple(images.shape[1:]))


def decibels(error: Tensor) -> Tensor:
    return -10 * error.clamp(min=10 ** (-PSNR_CAP / 10)).log10()


def patches_of(
    images: Tensor, size: tuple[int, int]
) -> Float[Tensor, "batch patches channels pixels"]:
    """Cut images into patches, row by row as a patch embedding does."""
    (height, width), (rows, columns) = size, images.shape[-2:]
    if height < 1 or width < 1 or rows % height or columns % width:
        raise expected(
            f"a patch size that divides {rows} x {columns} pixels", f"{height} x {width}"
        )
    cut = functional.unfold(images, size, stride=size)
    return cut.view(len(images), images.shape[1], height * width, -1).permute(0, 3, 1, 2)


def matched_mse(guess: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of (patches, channels, pixels) under the best patch assignment."""
    cost = _distances(guess, truth)
    from scipy.optimize import linear_sum_assignment

    # the same for any assignment, and where every patch is alike there is nothing left to search
    cost = cost - cost.amin(1, keepdim=True)
    cost = cost - cost.amin(0, keepdim=True)
    rows, columns = linear_sum_assignment(cost.numpy())
    moved = guess[torch.as_tensor(rows)] - truth[torch.as_tensor(columns)]
    return moved.square().mean()


def nearest_mse(guess: Tensor, truth: Tensor) -> Tensor:
    """Return what `matched_mse` is at least: each patch takes its nearest, taken or not."""
    nearest = _distances(guess, truth)
    return torch.maximum(nearest.amin(0).mean(), nearest.amin(1).mean()) / truth[0].numel()


def _distances(guess: Tensor, truth: Tensor) -> Float[Tensor, "guessed true"]:
    """Return the squared distances between patches (patches, channels, pixels)."""
    # Differences first: |g|^2 + |t|^2 - 2 g.t would not see equal patches as exactly equal.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(guess.flatten(1), truth.flatten(1), compute_mode=mode).square()
