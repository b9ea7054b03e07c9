"""What guesses without information score: without them a number means nothing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.metrics.checked import (
    Guesses,
    Images,
    PerImage,
    checked,
    decibels,
    matched_mse,
    nearest_mse,
    patches_of,
    same_shape,
)
from vitguard.metrics.pairs import psnr

__all__ = ["Baseline", "baseline"]


@dataclass(frozen=True, eq=False)
class Baseline:
    """What guesses made without the update score, in dB per image.

    Args:
        psnr: The best of the guesses without information.
        patch_psnr: The same, patches matched.
        thumbnail: Every patch flat in its own mean colour. It knows something: the image at one
            pixel a patch. No other order of flat patches is closer, so that matching adds nothing.
    """

    psnr: PerImage
    patch_psnr: PerImage
    thumbnail: PerImage


def baseline(
    truth: Images, patch_size: tuple[int, int], guesses: Guesses | None = None
) -> Baseline:
    """Score guesses without information, and the thumbnail: without them a number means nothing.

    Of the guesses the luckiest one counts, for each image and for each score. One flat colour is
    always among them: black, white, grey, and each channel off or on.

    Args:
        truth: Pixels in [0, 1].
        patch_size: (height, width) of a patch in pixels.
        guesses: Further images that were made without the truth, shaped like it.
    """
    truth = checked(truth, "truth", strict=True)
    flat_ones = _public_colours(truth)
    if guesses is None:
        guesses = flat_ones
    else:
        guesses = checked(guesses, "a guess without information", strict=True)
        same_shape(guesses, truth, "a guess without information")
        guesses = torch.cat([flat_ones, guesses])
    patches = patches_of(truth, patch_size)
    flat = (patches - patches.mean(-1, keepdim=True)).square().flatten(1).mean(1)
    raw = torch.stack([psnr(guess.expand_as(truth), truth) for guess in guesses]).amax(0)
    pieces = patches_of(guesses, patch_size)
    matched = torch.stack([_best_matched(one, pieces) for one in patches])
    return Baseline(raw, torch.maximum(raw, matched), decibels(flat))


def _public_colours(truth: Images) -> Guesses:
    """Return flat images of the colours that anyone would try."""
    channels = truth.shape[1]
    corners = itertools.product((0.0, 1.0), repeat=channels) if channels <= 4 else ()
    levels = [[v] * channels for v in (0.0, 0.25, 0.5, 0.75, 1.0)]
    colours = torch.tensor([*levels, *map(list, corners)], dtype=truth.dtype)
    return colours[:, :, None, None].expand(-1, -1, *truth.shape[2:])


def _best_matched(
    truth: Float[Tensor, "patches ..."], guesses: Float[Tensor, "guesses patches ..."]
) -> Float[Tensor, ""]:
    """Return the dB of the guess whose patches match those of `truth` best.

    Assigning hundreds of patches takes long: a guess whose nearest patches are no closer than the
    best assignment so far is left out.
    """
    hoped = torch.stack([decibels(nearest_mse(guess, truth)) for guess in guesses])
    best = torch.tensor(-torch.inf, dtype=torch.float64)
    for i in hoped.argsort(descending=True).tolist():
        if hoped[i] <= best:
            break
        best = torch.maximum(best, decibels(matched_mse(guesses[i], truth)))
    return best
