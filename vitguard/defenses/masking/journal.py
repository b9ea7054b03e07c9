"""What a client has answered, on its disk: a second answer is noticed wherever it is asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vitguard.errors import Rejected, expected
from vitguard.files import write_atomically

__all__ = ["Journal"]

_KEPT = 64  # rounds that are looked after: the newest that any process of the client began
_LINE = re.compile(rb"(\d{1,18}) (?:begun|[0-9a-f]{64} [a-z]+)\n")


class Journal:
    """A file of marks. Safe between threads and processes of one machine.

    Guarantees:
        Of several processes that mark the same at once, one goes on and the others are refused;
        so is a client whose state was set back within a round, as long as this file was not.
        Marks are kept for the newest 64 rounds that the client began; a client with the state of an
        older one is refused, whatever was dropped of it.

    Does not protect against:
        A state from before a round began: the round can then be begun once more, with new keys.

    Args:
        path: The file; it is made where it is not there, readable by its owner alone.
    """

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, str | os.PathLike) or "\0" in str(path):
            raise expected("the path of a journal", repr(path)[:80])
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Journal({str(self.path)!r})"

    def begin(self) -> int:
        """Return a number for a round that begins, above all before; drop marks no longer needed.

        Raises:
            InputError: The file cannot be written.
        """
        with self._locked() as file:
            marks = file.read()
            number = _newest(marks) + 1
            line = f"{number} begun\n".encode()
            if number % _KEPT:
                _append(file, marks, line)
            else:
                needed = [m for m in marks.splitlines(keepends=True) if _is_kept(m, number)]
                # the folder's own file, where the path is a link to it
                place = os.path.realpath(self.path)
                write_atomically(place, b"".join(needed) + line, private=True)
            return number

    def mark(self, what: bytes, phase: str, *, begun: int | None = None) -> None:
        """Write that a phase was answered.

        Args:
            what: 32 bytes that name the round of this client.
            begun: What `begin` returned for the round; None for a mark that is never dropped.

        Raises:
            Rejected: It was answered before, or the round is too old to tell.
            InputError: The file cannot be written.
        """
        number = "" if begun is None else f"{begun} "
        line = f"{number}{what.hex()} {phase}\n".encode()
        with self._locked() as file:
            marks = file.read()
            if begun is not None and begun <= _newest(marks) - _KEPT:
                raise Rejected(
                    "replay", f"a round with {_KEPT} or more begun after it", "a new one"
                )
            if line in marks.splitlines(keepends=True):
                raise Rejected("replay", f"the phase of {phase} a second time in one round")
            _append(file, marks, line)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Open the file and keep all others from it."""
        import fcntl  # keys are used on Linux alone

        try:
            while True:
                number = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
                with os.fdopen(number, "rb+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    if _is_there(file, self.path):  # nobody put another in its place meanwhile
                        yield file
                        return
        except OSError as error:
            raise expected("a journal that this client can write", error.strerror) from error


def _append(file: BinaryIO, marks: bytes, line: bytes) -> None:
    whole = not marks or marks.endswith(b"\n")  # a full disk leaves half a line
    file.write(line if whole else b"\n" + line)
    file.flush()
    os.fsync(file.fileno())


def _is_there(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _number(line: bytes) -> int | None:
    """Return the number of the round that a line is about; None where it tells none."""
    found = _LINE.fullmatch(line)
    return None if found is None else int(found[1])


def _newest(marks: bytes) -> int:
    numbers = map(_number, marks.splitlines(keepends=True))
    return max((n for n in numbers if n is not None), default=0)


def _is_kept(line: bytes, newest: int) -> bool:
    """Whether a mark is of a round that is looked after, or of none that has a number."""
    number = _number(line)
    return (number is None and line.endswith(b"\n")) or (
        number is not None and newest - _KEPT < number and b"begun" not in line
    )
