"""Images of files and folders, with their labels, ready for a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.data.folders import check_alike, class_notes, find_images, skipped
from vitguard.data.pixels import BITS, FRAMES, cover, faint_note, read_image, to_pixels
from vitguard.errors import expected

__all__ = ["ImageSet", "assign_labels", "check_labels", "count_images", "load_images"]

_DARK = 14


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
            numeric names the number is the class index, otherwise their sorted order is, of folders
            without images too. Hidden folders and `__MACOSX` are none. Several such folders have
            the same class folders, or numeric ones.
        size: (height, width) in pixels.
        count: Only the first `count` images; all by default.
        classes: Number of the model's classes. With it, labels are checked, and images without any
            get 0, 1, 2 ... modulo `classes`, which `notes` says.
        min_size: (height, width) that an image file must have at least: the model's patch.

    Raises:
        InputError: A file is missing, no image, truncated or too small; a folder has no images; a
            class index is out of range or has two folders; there are fewer than `count` images.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not all(map(str, paths)):
        raise expected("an image file or a folder", "an empty path")  # else the working folder
    found = [item for path in paths for item in find_images(Path(path), classes)]
    if not found:
        raise expected("at least one image", "none")
    check_alike(map(Path, paths))
    if count is not None and not 1 <= count <= len(found):
        raise expected(f"1 to {len(found)} images", f"count={count}")
    found = found[:count]
    pixels, enlarged, dark, several = [], 0, 0, 0
    for path, _, _ in found:
        image = read_image(path)
        if image.height < min_size[0] or image.width < min_size[1]:
            raise expected(
                f"images of at least {min_size[0]} x {min_size[1]} pixels, one patch",
                f"{image.height} x {image.width} in {path}",
            )
        several += image.info[FRAMES] > 1
        dark += image.info.get(BITS, 16) <= _DARK
        enlarged += image.height < size[0] or image.width < size[1]
        pixels.append(to_pixels(cover(image, size)))
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
    if several:
        notes.append(
            f"{several} of {len(found)} files have several frames, pages or bands: the first of "
            "each is taken"
        )
    images = torch.stack(pixels)
    if faint := faint_note(images):
        notes.append(faint)
    notes += skipped(paths)
    for folder in (Path(path) for path in paths if Path(path).is_dir()):
        notes += class_notes(folder)
    labels = _labels([label for _, _, label in found], classes, notes)
    names = _distinct([name for _, name, _ in found])
    return ImageSet(names, images, labels, tuple(notes))


def count_images(paths: str | Path | Iterable[str | Path]) -> int:
    """Return how many images `load_images` would find, without reading them.

    Raises:
        InputError: A file is missing, or a folder has no images.
    """
    each = [paths] if isinstance(paths, str | Path) else paths
    return sum(len(find_images(Path(path), None)) for path in each)


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
