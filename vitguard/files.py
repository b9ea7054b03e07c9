"""Files: written so that a reader never sees half of one, read without trust."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from vitguard.errors import expected

__all__ = ["check_writable", "parsed_json", "private_folder", "write_atomically", "write_text"]


def check_writable(path: str | Path) -> Path:
    """Return `path` as a Path if a file can be written there; nothing is left behind.

    Raises:
        InputError: The folder is missing or cannot be written, or `path` is a folder, a device or a
            pipe.
    """
    target = Path(path)
    _check(target, Path(os.path.realpath(target)))
    return target


def _check(target: Path, place: Path) -> None:
    """Refuse a target whose file cannot be put in its place."""
    try:
        if target.is_dir():
            raise expected("a file to write", f"the folder {target}")
        if target.exists() and not target.is_file():  # it would be gone for every program
            raise expected("a file to write", f"{target}, which is no file but a device or a pipe")
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except OSError as error:
        raise _not_written(target, error) from error


def private_folder(path: str | Path) -> Path:
    """Return a folder; one that is made is its owner's alone.

    Raises:
        InputError: It cannot be made, or something else is there.
    """
    folder = Path(path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise expected(f"a folder {folder} that can be made", error.strerror) from error
    return folder


def write_atomically(
    path: str | Path, content: bytes | str, *, private: bool = False, overwrite: bool = True
) -> None:
    """Write the whole content beside `path`, flush it to the disk, then move it into place.

    A link is followed, so that no older file stays behind it; not where the content is private.

    Args:
        private: Readable by its owner alone, from the first byte on.
        overwrite: Replace a file that is there. False never does, whoever makes it meanwhile.

    Raises:
        InputError: The file cannot be written, or it is there and `overwrite` is false.
    """
    target = Path(path)
    follow = overwrite and not private
    place = Path(os.path.realpath(target)) if follow else target
    _check(target, place)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name[:200]}.")
        _fill(handle, data)
        if not private:
            os.chmod(temporary, 0o644)
        if overwrite:
            os.replace(temporary, place)
            temporary = None
        else:
            _place_once(temporary, target, data)
        _flush_folder(place.parent)
    except FileExistsError as error:
        raise expected("a new file", f"{target}, which is there already") from error
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _fill(handle: int, data: bytes) -> None:
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _place_once(temporary: str, target: Path, data: bytes) -> None:
    """Give the file its name unless that is taken, in one step of the file system."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links here
        mode = os.stat(temporary).st_mode & 0o777
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            _fill(handle, data)
        except BaseException:
            os.unlink(target)
            raise


def _flush_folder(folder: Path) -> None:
    """Make the name itself survive a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:  # some network file systems cannot
            return
        finally:
            os.close(handle)


def _not_written(target: Path, error: OSError) -> Exception:
    return expected("a writable output path", f"{target} ({error.strerror or error})")


def write_text(text: str, path: str) -> None:
    """Write a line, or lines, to a file at once, or to standard output where the path is `-`."""
    if path == "-":
        sys.stdout.write(f"{text}\n")
    else:
        write_atomically(path, text)


def parsed_json(text: str | bytes) -> Any:
    """Parse JSON that nobody vouches for.

    Raises:
        ValueError: For every fault: syntax, encoding, nesting, numbers that are not finite.
    """
    try:
        return json.loads(text, parse_constant=_not_finite, parse_float=_finite)
    except RecursionError:
        problem = "it is nested too deeply"
    raise ValueError(problem)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)  # 1e400


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
