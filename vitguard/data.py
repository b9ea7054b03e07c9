"""Images to audit with: scikit-image's sample photos, image files and folders, and decoys.

Pixels are float32 in [0, 1], shape (images, 3, height, width). Nothing is ever downloaded: the
sample photos are read from the installed scikit-image package itself.
"""

from __future__ import annotations

import functools
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vitguard.errors import expected, missing_extra

__all__ = [
    "SAMPLE_NAMES",
    "ImageSet",
    "assign_labels",
    "check_labels",
    "count_images",
    "decoys",
    "load_images",
    "mean_image",
    "pictured",
    "sample_images",
    "sample_photos",
    "with_channels",
]

# Public domain, CC0 or without known restrictions, and inside the wheel.
_PHOTOS = {
    "astronaut": "astronaut.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
}
SAMPLE_NAMES = tuple(_PHOTOS)
"""Names of the sample photos, in the order in which `sample_images` takes them."""

# For decoys only: grey, partly textures. With fewer sources the crops of one photo crowd together,
# and smooth guesses without information beat them all more often than chance.
_GREY = {
    name: f"{name}.png"
    for name in ("camera", "coins", "cell", "clock_motion", "grass", "gravel", "brick")
}
_SOURCES = {**_PHOTOS, **_GREY}
_SUFFIXES = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe",
    ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
_BITS = "vitguard bits"  # of the largest value of a 16-bit file, among the facts of an image
_DARK = 14
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images ready for a model, before its normalisation.

    Args:
        names: One name per image, each different.
        pixels: float32 in [0, 1], shape (images, 3, height, width).
        labels: Class index per image, int64; None where none are known.
        notes: What the report should say about how the images were made.
    """

    names: tuple[str, ...]
    pixels: Float[Tensor, "images channels height width"]
    labels: Int[Tensor, " images"] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) != len(self.pixels):
            raise expected(f"{len(self.pixels)} names", len(self.names))
        if self.labels is not None and len(self.labels) != len(self.names):
            raise expected(f"{len(self.names)} labels", len(self.labels))

    def __len__(self) -> int:
        return len(self.names)


def sample_photos() -> dict[str, Image.Image]:
    """Return the sample photos inside the installed scikit-image, name -> RGB image.

    Raises:
        MissingExtra: scikit-image is not installed.
    """
    return {name: _read(_skimage_folder() / file) for name, file in _PHOTOS.items()}


def sample_images(
    size: tuple[int, int], *, count: int | None = None, classes: int | None = None
) -> ImageSet:
    """Return the first `count` sample photos as `load_images` would."""
    paths = [_skimage_folder() / file for file in _PHOTOS.values()]
    return load_images(paths, size, count=count, classes=classes)


def count_images(paths: str | Path | Iterable[str | Path]) -> int:
    """Return how many images `load_images` would find, without reading them.

    Raises:
        InputError: A file is missing, or a folder has no images.
    """
    each = [paths] if isinstance(paths, str | Path) else paths
    return sum(len(_find(Path(path), None)) for path in each)


def load_images(
    paths: str | Path | Iterable[str | Path],
    size: tuple[int, int],
    *,
    count: int | None = None,
    classes: int | None = None,
    min_size: tuple[int, int] = (1, 1),
) -> ImageSet:
    """Read images, scale each until it covers `size`, and cut out the centre.

    Greyscale, palette, 16-bit and CMYK files become RGB; alpha is dropped and EXIF orientation
    applied, as training pipelines do. The order is that of `paths`, sorted inside a folder.

    Args:
        paths: Files; a folder of images; or a folder of class folders. Where all class folders have
            numeric names the number is the class index, otherwise their sorted order is.
        size: (height, width) in pixels.
        count: Only the first `count` images; all by default.
        classes: Number of the model's classes. With it, labels are checked, and images without any
            get 0, 1, 2 ... modulo `classes`, which `notes` says.
        min_size: (height, width) that an image file must have at least: the model's patch.

    Raises:
        InputError: A file is missing, no image, truncated or too small; a folder has no images; a
            class index is out of range; there are fewer than `count` images.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    found = [item for path in paths for item in _find(Path(path), classes)]
    if not found:
        raise expected("at least one image", "none")
    if count is not None and not 1 <= count <= len(found):
        raise expected(f"1 to {len(found)} images", f"count={count}")
    found = found[:count]
    pixels, enlarged, dark = [], 0, 0
    for path, _, _ in found:
        image = _read(path)
        if image.height < min_size[0] or image.width < min_size[1]:
            raise expected(
                f"images of at least {min_size[0]} x {min_size[1]} pixels, one patch",
                f"{image.height} x {image.width} in {path}",
            )
        dark += image.info.get(_BITS, 16) <= _DARK
        enlarged += image.height < size[0] or image.width < size[1]
        pixels.append(_tensor(_cover(image, size)))
    notes = (
        [f"{enlarged} of {len(found)} images were enlarged to {size[0]} x {size[1]}"]
        if enlarged
        else []
    )
    if dark:
        notes.append(
            f"{dark} of {len(found)} images are dark: 16-bit files whose values need {_DARK} bits "
            "or fewer, divided by 65535; scale them to the full range to audit what they show"
        )
    notes += _skipped(paths)
    labels = _labels([label for _, _, label in found], classes, notes)
    names = _distinct([name for _, name, _ in found])
    return ImageSet(names, torch.stack(pixels), labels, tuple(notes))


def assign_labels(count: int, classes: int) -> Int[Tensor, " count"]:
    """Return the labels 0, 1, 2 ... modulo `classes`, for images that have none."""
    if count < 1 or classes < 1:
        raise expected("at least one image and one class", f"{count} and {classes}")
    return torch.arange(count) % classes


def check_labels(labels: Tensor, classes: int) -> Int[Tensor, " batch"]:
    """Return `labels` as int64, or raise `InputError` where one is no class of the model."""
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
        raise expected(
            "class indices of shape (batch,)", f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    labels = labels.long()  # first: torch cannot compare every unsigned type
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise expected(f"labels from 0 to {classes - 1}", int(wrong[0]))
    return labels


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
    further = [] if extra is None else [_picture(image) for image in extra]
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
    photos = [_read(_skimage_folder() / _SOURCES[name]) for name in _SOURCES]
    sources = [photos[i] for i in kept] + further
    whole = [_tensor(_cover(image, size)) for image in further[:count]]
    generator = np.random.default_rng(seed)
    crops = [_crop(sources[i % len(sources)], size, generator) for i in range(count - len(whole))]
    return torch.stack([*whole, *crops])


@functools.lru_cache(maxsize=8)
def _sources(size: tuple[int, int]) -> Float[Tensor, "sources 3 height width"]:
    """Return what decoys are taken from, prepared as an audit would."""
    folder = _skimage_folder()
    return torch.stack([_prepared(_read(folder / file), size) for file in _SOURCES.values()])


@functools.lru_cache(maxsize=2)
def _pool(rounds: int, size: tuple[int, int], seed: int) -> Tensor:
    """Return random parts of each source, shape (rounds, sources, 3, height, width)."""
    photos = [_read(_skimage_folder() / file) for file in _SOURCES.values()]
    generator = np.random.default_rng(seed)
    crops = [_crop(photo, size, generator) for _ in range(rounds) for photo in photos]
    return torch.stack(crops).unflatten(0, (rounds, len(photos)))


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


def _skimage_folder() -> Path:
    # Found without importing it: scikit-image's data module would bring in its downloader.
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra("The sample photos", "scikit-image")
    return Path(spec.submodule_search_locations[0]) / "data"


def _find(path: Path, classes: int | None) -> list[tuple[Path, str, int | None]]:
    """Return (file, name, label) of every image that `path` stands for."""
    if path.is_file():
        return [(path, path.stem, None)]
    if not path.is_dir():
        raise expected("an image file or a folder", f"{path}, which does not exist")
    try:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        grouped = {folder: _files(folder) for folder in folders}
        direct = _files(path)
    except OSError as error:
        raise expected("a readable folder", f"{path} ({error.strerror})") from error
    if any(grouped.values()) and direct:
        raise expected("either images or class folders", f"both in {path}")
    if not any(grouped.values()):
        if not direct:
            raise expected("a folder with images", f"{path} without any")
        return [(file, file.stem, None) for file in direct]
    numeric = all(folder.name.isdecimal() for folder in folders)
    found: list[tuple[Path, str, int | None]] = []
    for order, folder in enumerate(folders):
        label = int(folder.name) if numeric else order
        if classes is not None and label >= classes:
            raise expected(f"class folders from 0 to {classes - 1}", f"class {label} in {folder}")
        found += [(file, f"{folder.name}/{file.stem}", label) for file in grouped[folder]]
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in _SUFFIXES and p.is_file() and not p.name.startswith(".")
    )


def _skipped(paths: Iterable[str | Path]) -> list[str]:
    """Return for each folder how many files in it are no images by their names."""
    notes = []
    for folder in (Path(path) for path in paths if Path(path).is_dir()):
        inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
        inside += [
            p for f in inside if f.is_dir() for p in f.iterdir() if not p.name.startswith(".")
        ]
        others = [p for p in inside if p.is_file() and p.suffix.lower() not in _SUFFIXES]
        if others:
            kinds = sorted({p.suffix.lower() or "no suffix" for p in others})
            files = "1 file" if len(others) == 1 else f"{len(others)} files"
            were = "was" if len(others) == 1 else "were"
            notes.append(f"{files} in {folder} {were} skipped ({', '.join(kinds[:5])})")
    return notes


def _read(path: Path) -> Image.Image:
    """Return the first frame of an image file as upright 8-bit RGB."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images and of odd transparency; neither matters here.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
            return _rgb(upright)
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
        scaled.info[_BITS] = int(values.max()).bit_length()
        return scaled
    return image.convert("RGB")


def _cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale with antialiasing until the image covers `size`, and cut out the centre."""
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)


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
    return _tensor(ImageOps.mirror(part) if generator.random() < 0.5 else part)


def _prepared(image: Image.Image, size: tuple[int, int]) -> Float[Tensor, "3 height width"]:
    return _tensor(_cover(image, size))


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


def _tensor(image: Image.Image) -> Float[Tensor, "3 height width"]:
    values = np.array(image, dtype=np.uint8)
    return torch.from_numpy(values).permute(2, 0, 1).float() / 255


def _picture(pixels: Tensor) -> Image.Image:
    values = pixels.detach().cpu().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def _labels(
    found: Sequence[int | None], classes: int | None, notes: list[str]
) -> Int[Tensor, " images"] | None:
    known = [label for label in found if label is not None]
    if len(known) == len(found):
        return torch.tensor(known)
    if known:
        raise expected("labels for all images or for none", f"{len(known)} of {len(found)}")
    if classes is None:
        return None
    notes.append(f"the images have no labels: 0, 1, 2 ... modulo {classes} are used")
    return assign_labels(len(found), classes)


def _distinct(names: list[str]) -> tuple[str, ...]:
    """Number the names that occur again."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(distinct)
