"""What scores are compared with: decoys, guesses without information, and the thumbnail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitguard import data
from vitguard.metrics import Baseline, baseline

__all__ = ["DECOYS", "Scale", "covered", "decoys_for", "line_up", "uninformed"]

DECOYS = 1000
"""Images beside the true one in the identification test."""
_LARGEST = 64
"""Pixels a side at which images are told apart: larger ones are reduced."""
_NATURAL, _SMOOTH = 16, 8
"""How many decoys and how many images of smooth noise are guesses without information."""


@dataclass(frozen=True)
class Scale:
    """What numbers about a batch are compared with.

    Args:
        decoys: Images that are not in the batch, pixels in [0, 1], as `line_up` reduces them.
        baseline: What no update was needed for, on each image.
    """

    decoys: Tensor
    baseline: Baseline

    @staticmethod
    def of(truths: Tensor, patch_size: tuple[int, int], decoys: Tensor, seed: int) -> Scale:
        """Return the scale of `truths` beside the decoys of `decoys_for`."""
        size = (truths.shape[-2], truths.shape[-1])
        guesses = covered(uninformed(decoys, size, seed), patch_size)
        return Scale(decoys, baseline(covered(truths.cpu(), patch_size), patch_size, guesses))


def covered(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images to whole patches: the model never sees a border that no patch covers."""
    high, wide = (n - n % p for n, p in zip(images.shape[-2:], patch_size, strict=True))
    return images[..., :high, :wide]


def line_up(images: Tensor) -> Tensor:
    """Return images at the size at which they are told apart: at most 64 pixels a side.

    A thousand decoys of 224 pixels would take 600 MB, and what tells photos apart is coarse.
    """
    size = _reduced(images)
    if size == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images.float(), size, mode="area")


def decoys_for(truth: Tensor, seed: int, count: int = DECOYS) -> Tensor:
    """Return decoys as `line_up` makes them, with as many channels as `truth`.

    They show none of the truths. Grey ones for a single channel.
    """
    truth = line_up(truth.detach().cpu().float())
    channels, size = truth.shape[1], (truth.shape[-2], truth.shape[-1])
    colour = truth if channels == 3 else truth.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return data.with_channels(data.decoys(count, size, seed=seed, truth=colour), channels)


def uninformed(decoys: Tensor, size: tuple[int, int], seed: int) -> Tensor:
    """Return guesses that nobody needs an update for, of `size` (height, width).

    The mean of the decoys, some of the decoys, and smooth noise around the mean colour. Which of
    them is luckiest decides what a guess without information scores.
    """
    mean, some = decoys.mean(0, keepdim=True), decoys[:_NATURAL]
    generator = torch.Generator().manual_seed(seed)
    shape = (_SMOOTH, decoys.shape[1], *decoys.shape[-2:])
    noise = torch.fft.rfft2(torch.randn(shape, generator=generator))
    down = torch.fft.fftfreq(shape[2])[:, None].square() + torch.fft.rfftfreq(shape[3]).square()
    down[0, 0] = torch.inf  # the mean colour is added below
    smooth = torch.fft.irfft2(noise / down.sqrt(), s=shape[2:])
    spread = decoys.std((2, 3)).mean() / smooth.std().clamp(min=1e-12)
    smooth = mean.mean((2, 3), keepdim=True) + spread * smooth
    guesses = torch.cat([mean, some, smooth]).clamp(0, 1)
    if size == tuple(guesses.shape[-2:]):
        return guesses
    larger = F.interpolate(guesses, size, mode="bicubic", antialias=True, align_corners=False)
    return larger.clamp(0, 1)


def _reduced(images: Tensor) -> tuple[int, int]:
    high, wide = images.shape[-2:]
    factor = min(1.0, _LARGEST / max(high, wide))
    return max(1, round(high * factor)), max(1, round(wide * factor))
