"""Folders of images, and folders of class folders: which files are images, and of which class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vitguard.errors import expected

__all__ = ["check_alike", "class_notes", "find_images", "skipped"]

_SUFFIXES = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe",
    ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
_LEFTOVERS = frozenset({"__MACOSX"})  # of an archive; hidden folders are passed over as well
_NAMED = 3  # folders that a note names
_DEEPEST = 4  # folders below the one that was given, to look for images in


def find_images(path: Path, classes: int | None) -> list[tuple[Path, str, int | None]]:
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
    numbers = _numbered(grouped)
    _check_once(numbers, grouped)
    for folder, label in numbers.items():
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


def _check_once(numbers: Mapping[Path, int], grouped: Mapping[Path, Sequence[Path]]) -> None:
    """Refuse two folders with images for one number, such as `1` and `001`."""
    taken: dict[int, Path] = {}
    for folder, number in numbers.items():
        if grouped[folder] and (other := taken.setdefault(number, folder)) is not folder:
            raise expected(
                f"one folder a class in {folder.parent}",
                f"{other.name} and {folder.name} for class {number}",
                "Rename one of them, or put their images together.",
            )  # fmt: skip


def check_alike(paths: Iterable[Path]) -> None:
    """Refuse folders whose class folders count in different orders: one name had two numbers.

    Raises:
        InputError: Several folders with classes, not all named by numbers, that differ in names.
    """
    found = {}
    for path in dict.fromkeys(path for path in paths if path.is_dir()):
        grouped = {folder: _files(folder) for folder in _folders(path)}
        if any(grouped.values()):
            numbers = _numbered(grouped)
            found[path] = {folder.name: number for folder, number in numbers.items()}
    counted = [p for p, numbers in found.items() if any(not n.isdecimal() for n in numbers)]
    for path, numbers in found.items() if counted else ():
        if numbers != (first := found[counted[0]]):
            only = sorted(numbers.keys() ^ first.keys()) or list(numbers)
            raise expected(
                f"the same class folders in {counted[0]} and {path}",
                f"{_few(only)} in one of them",
                "Name the class folders by their numbers, or audit one folder at a time.",
            )  # fmt: skip


def class_notes(path: Path) -> list[str]:
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


def _links(count: int) -> str:
    return "1 link" if count == 1 else f"{count} links"


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
            f"image files in {folder}", f"{_links(len(lost))} to nothing, such as {lost[0].name}",
            "Bring back what they lead to, or remove them.",
        )  # fmt: skip
    return [p for p in named if p.is_file()]


def skipped(paths: Iterable[str | Path]) -> list[str]:
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
