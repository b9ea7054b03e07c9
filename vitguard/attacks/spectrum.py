"""Spatial frequencies: photos have a spectrum that falls as a power of them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["filtered", "frequencies"]


def frequencies(images: Float[Tensor, "*batch height width"]) -> Float[Tensor, "height half"]:
    """Return the frequency of each entry of `rfft2`, in cycles per pixel.

    The constant part counts as one wave over the longer side, so that a negative power is finite.
    """
    height, width = images.shape[-2:]
    like = {"dtype": images.dtype, "device": images.device}
    down = torch.fft.fftfreq(height, **like)[:, None]
    across = torch.fft.rfftfreq(width, **like)[None]
    return (down.square() + across.square()).sqrt().clamp_min(1 / max(height, width))


def filtered(
    images: Float[Tensor, "*batch height width"], gain: Float[Tensor, "height half"]
) -> Float[Tensor, "*batch height width"]:
    """Return the images, each entry of their spectrum times `gain`; differentiable."""
    return torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=images.shape[-2:])
