"""Decoys: natural images that are none of the truths, for identification."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from vitguard.data.photos import PHOTOS, photo_folder
from vitguard.data.pixels import cover, read_image, to_picture, to_pixels
from vitguard.errors import expected

__all__ = ["decoys"]

# For decoys only: grey, partly textures. With fewer sources the crops of one photo crowd together,
# and smooth guesses without information beat them all more often than chance.
_GREY = {
    name: f"{name}.png"
    for name in ("camera", "coins", "cell", "clock_motion", "grass", "gravel", "brick")
}
_SOURCES = {**PHOTOS, **_GREY}


def decoys(
    count: int,
    size: tuple[int, int],
    exclude_names: Iterable[str] = (),
    seed: int = 0,
    *,
    truth: Tensor | None = None,
    extra: Tensor | None = None,
) -> Float[Tensor, "count 3 height width"]:
    """Return `count` natural images that are none of the truths.

    First the `extra` images as they are, then random crops and mirror images of the sample photos,
    of further pictures in scikit-image, and of `extra`, in turn. Upright only: a guess that merely
    knows that the sky is above must gain nothing.

    Args:
        count: How many.
        size: (height, width) in pixels.
        exclude_names: Sample photos that must not be used, as in `ImageSet.names`.
        seed: The same seed gives the same decoys.
        truth: Pixels in [0, 1]; a photo or extra image that shows the same is left out, whatever
            its name (Pearson correlation above 0.9 at `size`).
        extra: Further images, pixels in [0, 1], shape (images, 3, any height, any width).

    Raises:
        InputError: `count` or `size` is below 1, shapes do not fit, or nothing is left.
    """
    if count < 1 or min(size) < 1:
        raise expected("a count and a size of at least 1", f"count={count}, size={size}")
    excluded = set(exclude_names)
    further = [] if extra is None else [to_picture(image) for image in extra]
    further = [image for image in further if not _shows(_prepared(image, size), truth)]
    kept = [
        i for i, (name, prepared) in enumerate(zip(_SOURCES, _sources(size), strict=True))
        if name not in excluded and not _shows(prepared, truth)
    ]  # fmt: skip
    if not kept and not further:
        raise expected("a photo or extra image to take decoys from", "all of them excluded")
    if not further:  # audits ask for the same ones again and again
        pool = _pool(25 * -(-count // (25 * len(kept))), size, seed)  # few pools serve all
        return pool[:, kept].flatten(0, 1)[:count].clone()
    photos = [read_image(photo_folder() / _SOURCES[name]) for name in _SOURCES]
    sources = [photos[i] for i in kept] + further
    whole = [to_pixels(cover(image, size)) for image in further[:count]]
    generator = np.random.default_rng(seed)
    crops = [_crop(sources[i % len(sources)], size, generator) for i in range(count - len(whole))]
    return torch.stack([*whole, *crops])


@functools.lru_cache(maxsize=8)
def _sources(size: tuple[int, int]) -> Float[Tensor, "sources 3 height width"]:
    """Return what decoys are taken from, prepared as an audit would."""
    folder = photo_folder()
    return torch.stack([_prepared(read_image(folder / file), size) for file in _SOURCES.values()])


@functools.lru_cache(maxsize=2)
def _pool(rounds: int, size: tuple[int, int], seed: int) -> Tensor:
    """Return random parts of each source, shape (rounds, sources, 3, height, width)."""
    photos = [read_image(photo_folder() / file) for file in _SOURCES.values()]
    generator = np.random.default_rng(seed)
    crops = [_crop(photo, size, generator) for _ in range(rounds) for photo in photos]
    return torch.stack(crops).unflatten(0, (rounds, len(photos)))


def _crop(
    image: Image.Image, size: tuple[int, int], generator: np.random.Generator
) -> Float[Tensor, "3 height width"]:
    """Return a random part of the image with the aspect of `size`, mirrored half of the time."""
    scale = min(image.height / size[0], image.width / size[1]) * generator.uniform(0.5, 1.0)
    height, width = size[0] * scale, size[1] * scale
    top = generator.uniform(0, image.height - height)
    left = generator.uniform(0, image.width - width)
    part = image.resize(
        (size[1], size[0]),
        Image.Resampling.BICUBIC,
        box=(left, top, min(left + width, image.width), min(top + height, image.height)),
        reducing_gap=3.0,
    )
    return to_pixels(ImageOps.mirror(part) if generator.random() < 0.5 else part)


def _prepared(image: Image.Image, size: tuple[int, int]) -> Float[Tensor, "3 height width"]:
    return to_pixels(cover(image, size))


def _shows(image: Tensor, truth: Tensor | None) -> bool:
    """Whether the image, prepared as an audit would, is one of the truths."""
    if truth is None:
        return False
    if truth.ndim != 4 or truth.shape[1:] != image.shape:
        size = tuple(image.shape[1:])
        raise expected(f"truth of shape (batch, 3, {size[0]}, {size[1]})", tuple(truth.shape))
    # In grey: the truths may be a colour photo that was made grey.
    both = torch.cat([image[None], truth.detach().cpu().float()])
    rows = both.double().mean(1).flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return bool((rows[1:] @ rows[0] > 0.9).any())
