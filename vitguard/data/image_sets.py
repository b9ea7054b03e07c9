"""Images of files and folders, with their labels, ready for a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.data.pixels import BITS, FRAMES, cover, faint_note, read_image, to_pixels
from vitguard.errors import expected

__all__ = ["ImageSet", "assign_labels", "check_labels", "count_images", "load_images"]

_SUFFIXES = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe",
    ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
_LEFTOVERS = frozenset({"__MACOSX"})  # of an archive; hidden folders are passed over as well
_NAMED = 3  # folders that a note names
_DARK = 14
_DEEPEST = 4  # folders below the one that was given, to look for images in


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
            without images too. Hidden folders and `__MACOSX` are none.
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
    if not all(map(str, paths)):
        raise expected("an image file or a folder", "an empty path")  # else the working folder
    found = [item for path in paths for item in _find(Path(path), classes)]
    if not found:
        raise expected("at least one image", "none")
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
    notes += _skipped(paths)
    for folder in (Path(path) for path in paths if Path(path).is_dir()):
        notes += _class_notes(folder)
    labels = _labels([label for _, _, label in found], classes, notes)
    names = _distinct([name for _, name, _ in found])
    return ImageSet(names, images, labels, tuple(notes))


def count_images(paths: str | Path | Iterable[str | Path]) -> int:
    """Return how many images `load_images` would find, without reading them.

    Raises:
        InputError: A file is missing, or a folder has no images.
    """
    each = [paths] if isinstance(paths, str | Path) else paths
    return sum(len(_find(Path(path), None)) for path in each)


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


def _find(path: Path, classes: int | None) -> list[tuple[Path, str, int | None]]:
    """Return (file, name, label) of every image that `path` stands for."""
    if path.is_file():
        return [(path, path.stem, None)]
    if not path.is_dir():
        raise expected("an image file or a folder", f"{path}, which does not exist")
    try:
        folders = _folders(path)
        grouped = {folder: _files(folder) for folder in folders}
        direct = _files(path)
    except OSError as error:
        raise expected("a readable folder", f"{path} ({error.strerror})") from error
    if any(grouped.values()) and direct:
        raise expected("either images or class folders", f"both in {path}")
    if not any(grouped.values()):
        if not direct:
            deeper = _deeper(path)
            raise expected(
                "a folder with images", f"{path} without any",
                f"There are some in {deeper}: give that folder." if deeper else "",
            )  # fmt: skip
        return [(file, file.stem, None) for file in direct]
    found: list[tuple[Path, str, int | None]] = []
    for folder, label in _numbered(grouped).items():
        if classes is not None and label >= classes:
            raise expected(f"class folders from 0 to {classes - 1}", f"class {label} in {folder}")
        found += [(file, f"{folder.name}/{file.stem}", label) for file in grouped[folder]]
    return found


def _folders(path: Path) -> list[Path]:
    """Return the folders in one that may be classes, sorted."""
    return sorted(
        p
        for p in path.iterdir()
        if p.is_dir() and not p.name.startswith(".") and p.name not in _LEFTOVERS
    )


def _numbered(grouped: Mapping[Path, Sequence[Path]]) -> dict[Path, int]:
    """Return the class of each folder: its name as a number, or else its place among all.

    A folder without images does not decide which; beside numbers it is a class only if it is one.
    """
    if all(folder.name.isdecimal() for folder, files in grouped.items() if files):
        return {folder: int(folder.name) for folder in grouped if folder.name.isdecimal()}
    return {folder: order for order, folder in enumerate(grouped)}


def _class_notes(path: Path) -> list[str]:
    """Return what a reader must know of how class folders were numbered."""
    grouped = {folder: _files(folder) for folder in _folders(path)}
    if not any(grouped.values()):
        return []
    numbers, notes = _numbered(grouped), []
    numeric = [folder.name.isdecimal() for folder in grouped]
    empty = [folder for folder, files in grouped.items() if not files]
    if any(numeric) and not all(numeric) and len(numbers) == len(grouped):
        said = _few([f"{folder.name} is class {number}" for folder, number in numbers.items()])
        notes.append(
            f"class folders of {path} are counted in sorted order, for not all of their names are "
            f"numbers ({said})"
        )
    if over := [f.name for f in empty if f not in numbers]:
        verb = "is" if len(over) == 1 else "are"
        notes.append(f"{_count(over)} in {path} without an image {verb} passed over ({_few(over)})")
    if kept := [f.name for f in empty if f in numbers and not f.name.isdecimal()]:
        verb = "counts as a class" if len(kept) == 1 else "count as classes"
        notes.append(f"{_count(kept)} in {path} without an image {verb} ({_few(kept)})")
    if inside := [f"{f.name}/{p.name}" for f in grouped for p in _folders(f)]:
        verb = "was" if len(inside) == 1 else "were"
        notes.append(
            f"{_count(inside)} inside class folders of {path} {verb} not looked at ({_few(inside)})"
        )
    return notes


def _count(folders: Sequence[str]) -> str:
    return "1 folder" if len(folders) == 1 else f"{len(folders)} folders"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _deeper(path: Path) -> Path | None:
    """Return the first folder of class folders further down, such as `train` of a data set."""
    for folder, inside, files in os.walk(path):
        inside[:] = sorted(
            name for name in inside if not name.startswith(".") and name not in _LEFTOVERS
        )
        here = Path(folder)
        depth = len(here.relative_to(path).parts)
        if depth and any(Path(name).suffix.lower() in _SUFFIXES for name in files):
            return here.parent
        if depth >= _DEEPEST:
            inside.clear()
    return None


def _files(folder: Path) -> list[Path]:
    named = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".")
    )
    if lost := [p for p in named if not p.exists()]:
        raise expected(
            f"image files in {folder}", f"{len(lost)} links to nothing, such as {lost[0].name}",
            "Bring back what they lead to, or remove them.",
        )  # fmt: skip
    return [p for p in named if p.is_file()]


def _skipped(paths: Iterable[str | Path]) -> list[str]:
    """Return for each folder how many files in it are no images by their names."""
    notes = []
    for folder in (Path(path) for path in paths if Path(path).is_dir()):
        inside = [
            p for p in folder.iterdir() if not p.name.startswith(".") and p.name not in _LEFTOVERS
        ]
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
