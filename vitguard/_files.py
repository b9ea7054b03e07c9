"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from vitguard.errors import expected

__all__ = ["check_writable", "write_atomically", "write_text"]


def check_writable(path: str | Path) -> Path:
    """Return `path` as a Path if a file can be written there; nothing is left behind.

    Raises:
        InputError: The folder is missing or cannot be written, or `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise expected("a file to write", f"the folder {target}")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise expected("a writable output path", f"{target} ({error.strerror})") from error
    return target


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write the whole content beside `path`, then move it into place."""
    target = check_writable(path)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text(text: str, path: str) -> None:
    """Write a line, or lines, to a file at once, or to standard output where the path is `-`."""
    if path == "-":
        sys.stdout.write(f"{text}\n")
    else:
        write_atomically(path, text)
