"""Standard output: it may be closed early, full, or without the letters of a name."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vitguard.errors import expected

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "shown", "shows_what_it_can"]

_ENDING = ("strict", "surrogateescape")  # the second is Python's own where the locale is C


def shows_what_it_can() -> None:
    """Let what standard output cannot encode be shown by its number, not end the command."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in _ENDING:
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Print inside, down to the system. A reader who leaves ends the output and nothing else.

    Raises:
        InputError: Standard output cannot be written, such as on a full disk.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _close()
    except OSError as error:
        _close()
        raise expected(
            "a standard output that can be written", error.strerror or str(error)
        ) from error


def console(*, to_error: bool = False) -> Console:
    """Return a console that falls silent when its reader leaves; rich's own ends the process."""
    from rich.console import Console

    class Silent(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True

    return Silent(stderr=to_error)


def _close() -> None:
    """Point standard output nowhere: what is left in its buffer would fail again at the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
