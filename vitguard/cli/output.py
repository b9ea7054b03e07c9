"""What people see: a progress bar, and standard output, which may be closed early or full."""

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

__all__ = ["Progress", "console", "shown", "shows_what_it_can"]

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


class Progress:
    """A progress bar on standard error, gone when it is done."""

    def __enter__(self) -> Progress:
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.completed}/{task.total}"),
            progress.TimeElapsedColumn(),
            console=console(to_error=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("undefended control", total=None)
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        self._bar.update(self._task, completed=done, total=total, description=what)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _close() -> None:
    """Point standard output nowhere: what is left in its buffer would fail again at the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
