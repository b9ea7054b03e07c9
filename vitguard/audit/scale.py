"""What scores are compared with: decoys, guesses without information, and the thumbnail."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitguard import data
from vitguard.metrics import Baseline, baseline

__all__ = ["DECOYS", "Scale", "covered", "decoys_for", "enlarged", "line_up", "uninformed"]

DECOYS = 1000
"""Images beside the true one in the identification test."""
_LARGEST = 64
"""Pixels a side at which images are told apart: larger ones are reduced."""
_EACH = 57
"""Guesses without information of each kind."""
_POWERS = (0.5, 1.5, 1.0)
"""Half the power of frequency by which the spectrum of noise falls; 0.5 is that of photos.

The steepest leave little but one broad light or dark patch, as the mean of a data set does.
"""
_TINT = 0.3
"""How much the channels of that noise differ."""
_TRIED = 16
"""How many of them are scored: assigning patches takes long."""


@dataclass(frozen=True)
class Scale:
    """What numbers about a batch are compared with.

    Args:
        decoys: Images that are not in the batch, pixels in [0, 1], as `line_up` reduces them.
        baseline: What guesses made without the update score on each image.
        uninformed: Guesses without information, of the decoys' size.
    """

    decoys: Tensor
    baseline: Baseline
    uninformed: Tensor

    @staticmethod
    def of(truths: Tensor, patch_size: tuple[int, int], decoys: Tensor, seed: int) -> Scale:
        """Return the scale of `truths` beside the decoys of `decoys_for`."""
        nulls = uninformed(decoys, seed)
        few = covered(enlarged(nulls[:_TRIED], truths), patch_size)
        level = baseline(covered(truths.detach().cpu(), patch_size), patch_size, few)
        return Scale(decoys, level, nulls)


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


def uninformed(decoys: Tensor, seed: int) -> Tensor:
    """Return guesses made without the update, shaped like the decoys.

    The mean of the decoys; then in turn a decoy, a blurred decoy, and noise around the mean colour
    whose spectrum falls as that of photos does, or faster; last broad patterns of light.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, size = decoys.mean(0, keepdim=True), (decoys.shape[-2], decoys.shape[-1])
    down = torch.fft.fftfreq(size[0])[:, None].square() + torch.fft.rfftfreq(size[1]).square()
    down[0, 0] = 1.0
    made = [mean]
    spread = decoys.std((2, 3)).mean()
    for i in range(_EACH):
        photo, other = decoys[2 * i % len(decoys)], decoys[(2 * i + 1) % len(decoys)]
        grey, tint = torch.randn(2, *decoys.shape[1:], generator=generator)
        waves = torch.fft.rfft2(grey[:1] + _TINT * tint)  # photos vary in light more than in hue
        waves[:, 0, 0] = 0  # the mean colour is added below
        smooth = torch.fft.irfft2(waves / down ** _POWERS[i % len(_POWERS)], s=size)
        smooth = spread / smooth.std().clamp(min=1e-12) * smooth
        colour = mean[0].mean((1, 2), keepdim=True)
        made.append(torch.stack([photo, _blurred(other), colour + smooth]))
    return torch.cat([*made, *_broad(decoys)]).clamp(0, 1)


def _broad(like: Tensor) -> list[Tensor]:
    """Return broad patterns of light: slopes and a light or dark middle, as photos have them."""
    high, wide = like.shape[-2:]
    down, across = torch.linspace(-1, 1, high)[:, None], torch.linspace(-1, 1, wide)[None]
    middle = 1 - (down.square() + across.square())
    parts = [down.expand(high, wide), across.expand(high, wide), middle]
    signs = itertools.product((-1.0, 0.0, 1.0), repeat=len(parts))
    shapes = [sum(s * part for s, part in zip(each, parts, strict=True)) for each in signs]
    made = [0.5 + 0.15 * shape for shape in shapes if isinstance(shape, Tensor) and shape.std() > 0]
    return [shape.expand(1, *like.shape[1:]) for shape in made]


def _blurred(image: Tensor) -> Tensor:
    width = max(3, image.shape[-1] // 5) | 1
    return F.avg_pool2d(image[None], width, 1, width // 2, count_include_pad=False)[0]


def enlarged(images: Tensor, like: Tensor) -> Tensor:
    """Return images at the size of others."""
    size = (like.shape[-2], like.shape[-1])
    if size == tuple(images.shape[-2:]):
        return images
    larger = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    return larger.clamp(0, 1)


def _reduced(images: Tensor) -> tuple[int, int]:
    high, wide = images.shape[-2:]
    factor = min(1.0, _LARGEST / max(high, wide))
    return max(1, round(high * factor)), max(1, round(wide * factor))
