"""How a server that writes the embedding lays a patch out in its token, and what photos look like.

The server keeps two directions of the token to itself. LayerNorm takes the mean and the scale of a
token away; a constant along `scale` gives them back. Along `signal` nothing stands but what the
server lets later layers read, so that the gradient there is the same for all tokens of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.core import Normalization
from vitguard.vit import Anatomy

__all__ = ["Channels", "natural_images", "natural_patches", "waves_of"]

_IMAGES = 48
_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
_POWER = (1.0, 0.145, 0.014)  # variance along brightness, red-blue and green-magenta
_KNEE = 0.65  # cycles of a patch below which power stays the same


@dataclass(frozen=True)
class Channels:
    """Orthonormal directions of a token of width D, and of a patch of P pixels; float64.

    Args:
        patches: The R = min(P, D - 3) strongest waves of natural patches, shape (P, R). What a
            patch has along the others is lost.
        data: Where the token holds them, shape (D, R), orthogonal to (1, ..., 1).
        scale, signal: The reserved directions, shape (D,). Positions have nothing along them where
            D leaves room for that.
        out: What the head reads, shape (D,): a direction in which no token has anything, so that an
            average over tokens is no second way for the gradient. `signal` where D leaves no room.
        sink: A direction in which prefix tokens alone have anything, shape (D,).
    """

    patches: Float[Tensor, "pixels waves"]
    data: Float[Tensor, "width waves"]
    scale: Float[Tensor, " width"]
    signal: Float[Tensor, " width"]
    out: Float[Tensor, " width"]
    sink: Float[Tensor, " width"]

    @staticmethod
    def of(
        anatomy: Anatomy,
        positions: Float[Tensor, "rows width"],
        generator: torch.Generator,
        *,
        sink: bool = False,
    ) -> Channels:
        """Return a layout that keeps strong waves away from where the positions are.

        Args:
            sink: Whether prefix tokens need a direction of their own; else it is `signal`.
        """
        width = anatomy.width
        ones = torch.full((1, width), width**-0.5, dtype=torch.float64)
        spread = positions - positions.mean(1, keepdim=True)
        _, sizes, rows = torch.linalg.svd(spread, full_matrices=True)
        taken = int((sizes > 1e-6 * sizes.max().clamp_min(1e-30)).sum())
        free = rows[taken:]
        turn = torch.linalg.qr(torch.randn(len(free), len(free), generator=generator).double()).Q
        # free directions first, then those where positions are weak
        ordered = torch.cat([ones, turn @ free, rows[:taken].flip(0)])
        basis = torch.linalg.qr(ordered.T).Q[:, 1:width]
        begin = 2 + sink
        waves = waves_of(anatomy)[:, : width - 1 - begin]
        end = begin + waves.shape[1]
        out = basis[:, end if anatomy.pooling != "token" and end < basis.shape[1] else 1]
        kept = basis[:, 0], basis[:, 1]
        return Channels(waves, basis[:, begin:end], *kept, out, basis[:, begin - 1])


def waves_of(anatomy: Anatomy) -> Float[Tensor, "pixels waves"]:
    """Return the waves of a patch, an orthonormal basis, those strong in photos first."""
    (high, wide), channels = anatomy.patch_size, anatomy.channels
    down, across = _cosines(high), _cosines(wide)
    if channels == 3:
        axes = torch.nn.functional.normalize(torch.tensor(_AXES, dtype=torch.float64))
        power = torch.tensor(_POWER, dtype=torch.float64)
    else:
        axes = _cosines(channels)
        power = torch.tensor([1.0] + [0.1] * (channels - 1), dtype=torch.float64)
    basis = torch.einsum("kc,ui,vj->kuvcij", axes, down, across).reshape(-1, anatomy.patch_pixels)
    rows, columns = torch.arange(high)[:, None] / high, torch.arange(wide)[None] / wide
    cycles = (rows.square() + columns.square()) * max(high, wide) ** 2
    strength = power[:, None, None] / (_KNEE**2 + cycles)
    return basis[strength.flatten().argsort(descending=True, stable=True)].T


def _cosines(size: int) -> Tensor:
    """Return the orthonormal type-II cosine basis, one wave a row."""
    at = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(torch.pi * (at[None] + 0.5) * at[:, None] / size) * (2 / size) ** 0.5
    waves[0] /= 2**0.5
    return waves


def natural_patches(
    anatomy: Anatomy, normalization: Normalization, generator: torch.Generator
) -> Float[Tensor, "patches pixels"]:
    """Return patches of drawn images with the spectrum of photos, in model-input units.

    Images differ in contrast, and every other patch gets a brightness between black and white: the
    tails of photos are heavier than a Gaussian's.
    """
    draws = {"generator": generator, "dtype": torch.float64}
    patches = _drawn(anatomy, normalization, generator).flatten(0, 1)
    pixels = normalization.invert(_apart(patches, anatomy))
    level = torch.rand(len(pixels[::2]), 1, 1, 1, **draws)
    pixels[::2] += level - pixels[::2].mean((1, 2, 3), keepdim=True)
    return normalization.apply(pixels).flatten(1)


def natural_images(
    anatomy: Anatomy, normalization: Normalization, generator: torch.Generator
) -> Float[Tensor, "images channels high wide"]:
    """Return drawn images with the spectrum of photos, in model-input units."""
    return anatomy.unpatchify(_drawn(anatomy, normalization, generator))


def _drawn(
    anatomy: Anatomy, normalization: Normalization, generator: torch.Generator
) -> Float[Tensor, "images patches pixels"]:
    """Return the patches of drawn images, which differ in contrast."""
    shape = (anatomy.channels, *anatomy.image_size)
    prior = NaturalImages.shaped(anatomy, shape, normalization)
    draws = {"generator": generator, "dtype": torch.float64}
    contrast = (0.4 * torch.randn(_IMAGES, 1, 1, 1, **draws)).exp()
    return prior.colour(contrast * torch.randn(_IMAGES, *shape, **draws))


def _apart(patches: Tensor, anatomy: Anatomy) -> Float[Tensor, "n channels high wide"]:
    return patches.unflatten(1, (anatomy.channels, *anatomy.patch_size))
