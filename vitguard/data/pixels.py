"""Image files as upright RGB pixels, and pixels with other numbers of channels."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vitguard.errors import expected

__all__ = [
    "BITS",
    "FRAMES",
    "copies_note",
    "cover",
    "faint_note",
    "mean_image",
    "pictured",
    "read_image",
    "to_picture",
    "to_pixels",
    "with_channels",
]

BITS = "vitguard bits"  # of the largest value of a 16-bit file, among the facts of an image
FRAMES = "vitguard frames"  # how many an image file has, where only the first is taken
_FAINT = 0.1
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


def read_image(path: Path) -> Image.Image:
    """Return the first frame of an image file as upright 8-bit RGB."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images and of odd transparency; neither matters here.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                deep = ";16" in str(image.tile)  # colours: Pillow keeps the higher 8 of 16 bits
                image.load()
                # phones keep previews of the same photo behind it (MPO)
                frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
                upright = ImageOps.exif_transpose(image)
            picture = _rgb(upright)
            picture.info[FRAMES] = frames
            if deep and BITS not in picture.info:
                picture.info[BITS] = 8 + int(np.asarray(picture).max()).bit_length()
            return picture
    except UnidentifiedImageError as error:
        raise expected("an image file", f"{path}, which is not one") from error
    except _UNREADABLE as error:
        raise expected("a readable image file", f"{path} ({error})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} that are neither 8 nor 16 bits")
        # Pillow would clip these at 255 instead of scaling them.
        scaled = Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
        scaled.info[BITS] = int(values.max()).bit_length()
        return scaled
    return image.convert("RGB")


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale with antialiasing until the image covers `size`, and cut out the centre."""
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)


def to_pixels(image: Image.Image) -> Float[Tensor, "3 height width"]:
    values = np.array(image, dtype=np.uint8)
    return torch.from_numpy(values).permute(2, 0, 1).float() / 255


def to_picture(pixels: Tensor) -> Image.Image:
    values = pixels.detach().cpu().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def faint_note(images: Float[Tensor, "images channels height width"]) -> str:
    """Return what a report says of images that show next to nothing, "" where all use their range.

    Those are nearly black or of one value: 98 % of the pixels of each channel lie within a tenth.
    """
    step = max(1, images[0, 0].numel() // 2**16)
    rows = images.detach().float().flatten(2)[:, :, ::step].sort(dim=2).values
    edge = rows.shape[2] // 100
    spread = (rows[:, :, -1 - edge] - rows[:, :, edge]).amax(1)
    count = int((spread < _FAINT).sum())
    if not count:
        return ""
    return (
        f"{count} of {len(images)} images are nearly black or of one value (98 % of the pixels "
        f"within {_FAINT:g} of each other): dB and decoys say little of them; scale what they show "
        "to 0..1"
    )


def copies_note(images: Float[Tensor, "images channels height width"]) -> str:
    """Return what a report says of images that are there more than once, "" where none is."""
    copies = len(images) - len({image.detach().cpu().float().numpy().tobytes() for image in images})
    if not copies:
        return ""
    said = (
        "1 image is a copy of another" if copies == 1 else f"{copies} images are copies of others"
    )
    return f"{said}: each counts once among those told from decoys"


def mean_image(
    images: Float[Tensor, "images channels height width"],
) -> Float[Tensor, "channels height width"]:
    """Return the mean of the images: what knowing the kind of data alone would let one guess."""
    if images.ndim != 4 or not len(images):
        raise expected("images of shape (batch, channels, height, width)", tuple(images.shape))
    return images.mean(0)


def with_channels(
    images: Float[Tensor, "batch 3 height width"], channels: int
) -> Float[Tensor, "batch channels height width"]:
    """Return colour images with as many channels: grey for one, else R, G, B, R, ... in turn."""
    if channels < 1:
        raise expected("at least one channel", channels)
    if channels == 1:
        return images.mean(-3, keepdim=True)
    return images if channels == 3 else images[..., [i % 3 for i in range(channels)], :, :]


def pictured(images: Tensor) -> Tensor:
    """Return (..., channels, height, width) as people see it: grey of two, else the first three."""
    channels = images.shape[-3]
    if channels in (1, 3):
        return images
    return images.mean(-3, keepdim=True) if channels == 2 else images[..., :3, :, :]
