"""Guesses against all truths of a batch, under the best assignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitguard.errors import expected
from vitguard.metrics.checked import (
    Decoys,
    Guesses,
    Images,
    Perceptual,
    PerImage,
    checked,
    decibels,
    patches_of,
    same_shape,
)
from vitguard.metrics.identify import identification
from vitguard.metrics.pairs import fft2d, lpips, mse, patch_psnr, psnr, ssim

__all__ = [
    "RECOVERED",
    "MaskScore",
    "Scores",
    "best_assignment",
    "mask_score",
    "recovered",
    "score",
]

RECOVERED = 30.0
"""Decibels from which one patch counts as recovered: errors of 3 % of the pixel range."""
_ABOVE_FLAT = 6.0


@dataclass(frozen=True)
class MaskScore:
    """How well shuffled positions were found; None where it is undefined (nothing to divide by)."""

    precision: float | None
    recall: float | None


def mask_score(
    inferred: Bool[Tensor, "guesses patches"],
    true: Bool[Tensor, "batch patches"],
    assignment: Sequence[int] | Int[Tensor, " batch"],
) -> MaskScore:
    """Compare inferred masks with the true ones, image by image under `assignment`, pooled."""
    chosen = inferred.detach().cpu().bool()[torch.as_tensor(assignment, dtype=torch.long)]
    true = true.detach().cpu().bool()
    if chosen.shape != true.shape:
        raise expected(f"masks of shape {tuple(true.shape)}", tuple(chosen.shape))
    both, said, there = (int(m.sum()) for m in (chosen & true, chosen, true))
    return MaskScore(both / said if said else None, both / there if there else None)


def recovered(
    guess: Guesses,
    verified: Bool[Tensor, "guesses patches"],
    truth: Images,
    patch_size: tuple[int, int],
) -> Bool[Tensor, "batch patches"]:
    """Return which true patches a patch that the attack claims to have proved does reproduce.

    A patch counts where some verified guess, at any position and in any image, comes within
    `RECOVERED` dB and at least as far above the patch's own mean colour as a leak must be. A batch
    whose images cannot be told apart, or a shuffle that hides where a patch was, gives them away
    all the same, while the PSNR of whole images stays low.

    Args:
        guess: Pixels in [0, 1].
        verified: The patches of `guess` that the attack vouches for.
        truth: Pixels in [0, 1].
        patch_size: (height, width) of a patch in pixels.
    """
    guess, truth = checked(guess, "guess"), checked(truth, "truth", strict=True)
    same_shape(guess, truth, "a guess")
    patches, claimed = patches_of(truth, patch_size), patches_of(guess, patch_size)
    if verified.shape != claimed.shape[:2]:
        raise expected(f"verified of shape {tuple(claimed.shape[:2])}", tuple(verified.shape))
    claimed = claimed[verified.detach().cpu().bool()].flatten(1)
    if not len(claimed):
        return torch.zeros(patches.shape[:2], dtype=torch.bool)
    flat = (patches - patches.mean(-1, keepdim=True)).square().mean((-2, -1))
    wanted = patches.flatten(2)
    distance = torch.cdist(wanted, claimed, compute_mode="donot_use_mm_for_euclid_dist")
    error = distance.min(-1).values.square() / wanted.shape[-1]
    level = decibels(error)
    return (level >= RECOVERED) & (level >= decibels(flat) + _ABOVE_FLAT)


def best_assignment(quality: Float[Tensor, "guesses truths"]) -> Int[Tensor, " truths"]:
    """Return the index of the guess assigned to each truth, with the largest summed quality.

    One-to-one where there are enough guesses. With fewer guesses than truths, each remaining truth
    takes its best guess; with more, some guesses stay unused.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(quality.numpy(), maximize=True)
    chosen = quality.argmax(0)
    chosen[torch.as_tensor(columns)] = torch.as_tensor(rows)
    return chosen


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a guess against each truth; every tensor has one entry per truth.

    Args:
        psnr: dB under `assignment`, the best by this number.
        patch_psnr: dB, patches matched, under `patch_assignment`, the best by this number.
        ssim, mse, fft2d: Under `assignment`.
        assignment, patch_assignment: Index of the guess that stands for each truth.
        identified: Whether the truth is nearer than every decoy; None without decoys.
        decoys: How many decoys there were.
        lpips: None without a model.
        recovered: Which true patches a verified patch reproduces; None where nothing is verified.
    """

    psnr: PerImage
    patch_psnr: PerImage
    ssim: PerImage
    mse: PerImage
    fft2d: PerImage
    assignment: Int[Tensor, " batch"]
    patch_assignment: Int[Tensor, " batch"]
    identified: Bool[Tensor, " batch"] | None = None
    decoys: int = 0
    lpips: PerImage | None = None
    recovered: Bool[Tensor, "batch patches"] | None = None


def score(
    guess: Guesses,
    truth: Images,
    patch_size: tuple[int, int],
    *,
    decoys: Decoys | None = None,
    lpips_model: Perceptual | None = None,
    verified: Bool[Tensor, "guesses patches"] | None = None,
) -> Scores:
    """Score guesses against all truths under the best assignment of guesses to truths.

    Args:
        guess: Pixels in [0, 1], in any order; one may stand for the whole batch.
        truth: Pixels in [0, 1].
        patch_size: (height, width) of a patch in pixels.
        decoys: Other images for the identification, none of them a truth.
        lpips_model: See `lpips`.
        verified: See `recovered`.

    Raises:
        InputError: Values that are not finite, shapes that differ, patches that do not divide.
    """
    guess, truth = checked(guess, "guess"), checked(truth, "truth", strict=True)
    same_shape(guess, truth, "a guess")
    rows = [g.expand_as(truth) for g in guess[:, None]]
    raw = torch.stack([psnr(row, truth) for row in rows])
    matched = torch.stack([patch_psnr(row, truth, patch_size) for row in rows])
    assignment, patch_assignment = best_assignment(raw), best_assignment(matched)
    each = torch.arange(len(truth))
    chosen = guess[assignment]
    return Scores(
        psnr=raw[assignment, each],
        patch_psnr=matched[patch_assignment, each],
        ssim=ssim(chosen, truth),
        mse=mse(chosen, truth),
        fft2d=fft2d(chosen, truth),
        assignment=assignment,
        patch_assignment=patch_assignment,
        identified=None if decoys is None else identification(guess, truth, decoys),
        decoys=0 if decoys is None else len(decoys),
        lpips=None if lpips_model is None else lpips(chosen, truth, lpips_model),
        recovered=None if verified is None else recovered(guess, verified, truth, patch_size),
    )
