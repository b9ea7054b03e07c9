"""Rounds of federated learning: which one a message belongs to, and what a client keeps of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

from vitguard.errors import InputError, Rejected, expected
from vitguard.files import parsed_json, write_atomically

__all__ = ["Progress", "Round", "bound", "current", "first_version", "next_version"]


@dataclass(frozen=True)
class Round:
    """One round, as a message of one client names it. All of it is public.

    Args:
        number: Of the round, at least 0.
        base: Version of the public model that the update refers to (`next_version`).
        weight: Of the client in the average, above 0.
        client: Name of the client, "" where it does not matter.
    """

    number: int
    base: str
    weight: float = 1.0
    client: str = ""

    def __post_init__(self) -> None:
        _check_number(self.number, least=0)
        _check_version(self.base)
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise expected("a weight, one number", repr(self.weight)[:80])
        if not 0 < self.weight < math.inf:
            raise expected("a finite weight above 0", self.weight)
        if not isinstance(self.client, str):
            raise expected("the name of a client as text", repr(self.client)[:80])


_current: ContextVar[Round | None] = ContextVar("vitguard_round", default=None)


def current() -> Round | None:
    """Return the round that this thread or task is in, None outside of one."""
    return _current.get()


@contextmanager
def bound(now: Round) -> Iterator[Round]:
    """Let every message that is made in the block belong to `now`."""
    token = _current.set(now)
    try:
        yield now
    finally:
        _current.reset(token)


def next_version(base: str, total: bytes) -> str:
    """Return the version of the public model after a sum was added to the one called `base`.

    Clients and server compute it alike, and the server needs no weights for it. It names the whole
    history: a client that missed a sum, or was given another one, arrives at another version.

    Args:
        base: Version before: a hexadecimal SHA-256, or the name of the starting weights.
        total: The sum as it was sent.
    """
    _check_version(base)
    digest = hashlib.sha256(base.encode("utf-8", "surrogatepass")).digest()
    return hashlib.sha256(digest + hashlib.sha256(total).digest()).hexdigest()


def first_version(weights: str, run: bytes) -> str:
    """Return the version of starting weights in one run: messages of another run fit none of it.

    Args:
        weights: What `model_version` says of the weights.
        run: The name of the run, alike for clients and server and never used before: bytes that
            the server drew, or the number of a job.
    """
    return next_version(weights, b"vitguard run\0" + run)


@dataclass(frozen=True)
class Progress:
    """What a client must keep between messages: the last round it opened, and its model version.

    Guarantees:
        `after` and `save` never go back to an earlier round, nor to another model of the same one.

    Does not protect against:
        A file that somebody puts back: keep it where only the client writes.

    Args:
        opened: The last round whose sum was opened, -1 for none; `Decryptor(opened=...)` takes it.
        base: Version of the model that the client has.
    """

    opened: int = -1
    base: str = ""

    def __post_init__(self) -> None:
        _check_number(self.opened, least=-1)
        _check_version(self.base)

    def after(self, number: int, base: str) -> Progress:
        """Return the progress once the sum of a round was opened.

        Raises:
            Rejected: The round was opened before, or a later one was.
        """
        later = Progress(number, base)
        if number <= self.opened:
            raise Rejected("replay", f"round {number} after round {self.opened}")
        return later

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes) -> Progress:
        """Read what `to_json` wrote.

        Raises:
            InputError: It is something else.
        """
        try:
            stored = parsed_json(text)
            if stored.keys() != {"opened", "base"}:
                raise KeyError(f"fields {sorted(stored)[:4]}")
            return Progress(**stored)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise expected("a client's progress as JSON", type(error).__name__) from error

    def save(self, path: str | Path) -> None:
        """Write it, atomically; readable by its owner alone.

        Raises:
            Rejected: The file holds a later round, or another model of this one.
            InputError: The file holds something else, or cannot be written.
        """
        if Path(path).exists():
            stored = Progress.load(path)
            if stored != self and stored.opened >= self.opened:
                raise Rejected("replay", f"round {self.opened} after round {stored.opened}")
        write_atomically(path, self.to_json(), private=True)

    @staticmethod
    def load(path: str | Path) -> Progress:
        """Read what `save` wrote. A file that is missing is an error: nothing was kept, then.

        Raises:
            InputError: There is no such file, or it holds something else.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise expected("a saved progress", f"{path} ({error.strerror})") from error
        return Progress.from_json(content)


def _check_number(number: object, *, least: int) -> None:
    if type(number) is not int or not least <= number < 2**63:
        raise expected(f"a whole round number of at least {least}", repr(number)[:80])


def _check_version(base: object) -> None:
    if not isinstance(base, str):
        raise expected("the version of the public model as text", repr(base)[:80])
