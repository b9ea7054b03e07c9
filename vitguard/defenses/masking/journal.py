"""What a client has answered, on its disk: a second answer is noticed wherever it is asked for."""

from __future__ import annotations

import os
from pathlib import Path

from vitguard.errors import Rejected, expected

__all__ = ["Journal"]


class Journal:
    """A file of marks that only grows. Safe between threads and processes of one machine.

    Guarantees:
        Of several processes that mark the same at once, one goes on and the others are refused;
        so is a client whose state was set back within a round, as long as this file was not.

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

    def mark(self, what: bytes, phase: str) -> None:
        """Write that a phase was answered.

        Args:
            what: 32 bytes that name the round of this client.

        Raises:
            Rejected: It was answered before.
            InputError: The file cannot be written.
        """
        import fcntl  # keys are used on Linux alone

        line = f"{what.hex()} {phase}\n".encode()
        try:
            number = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(number, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                marks = file.read()
                if line in marks.splitlines(keepends=True):
                    raise Rejected("replay", f"the phase of {phase} a second time in one round")
                whole = not marks or marks.endswith(b"\n")  # a full disk leaves half a line
                file.write(line if whole else b"\n" + line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise expected("a journal that this client can write", error.strerror) from error
