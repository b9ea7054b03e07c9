"""Error feedback: what a defense cut from one update of a client is added to its next one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vitguard import rounds
from vitguard.core import Update
from vitguard.defenses.base import UpdateDefense
from vitguard.errors import expected

__all__ = ["Feedback", "Residual"]

_BEGIN_ANEW = "Call guard.forget_residuals() to begin anew."


@dataclass(frozen=True)
class Residual:
    """What one defense cut from the last update that left. Secret: a part of a plain update.

    Args:
        kind: Of that update, `gradient` or `difference`.
        round: Its number; -1 where the update belonged to none.
        tensors: By name; those of which nothing was cut are left out.
    """

    kind: str
    round: int
    tensors: Mapping[str, Tensor] = field(repr=False)


class Feedback:
    """The residuals of one client, by the name of the defense. Local.

    Copies and pickles begin without any, as those of `Draws` do: a model that is given away must
    not carry parts of plain updates. `Guard.state_dict` holds them.

    Guarantees:
        A residual enters one update that leaves, whatever threads do.

    Does not protect against:
        What all updates show together: see `LowRankUpdate`.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Residual] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(self), ())

    def __deepcopy__(self, memo: dict[int, Any]) -> Feedback:
        return type(self)()

    def __bool__(self) -> bool:
        return bool(self._kept)

    def clear(self) -> None:
        """Forget all residuals: what was cut is lost."""
        with self._lock:
            self._kept = {}

    @contextmanager
    def around(self) -> Iterator[_Passage]:
        """Open the way of one update: at its end what was cut is kept, on an error nothing changed.

        While it is open another thread's update finds no residual, and is sent without.
        """
        passage = _Passage(self)
        try:
            yield passage
        except BaseException:
            self._add(passage.taken)
            raise
        self._add(passage.left)

    def take(self, name: str) -> Residual | None:
        """Remove the residual of a defense and return it."""
        with self._lock:
            return self._kept.pop(name, None)

    def _add(self, residuals: Mapping[str, Residual]) -> None:
        with self._lock:
            for name, residual in residuals.items():
                if (there := self._kept.get(name)) is not None:  # of another thread
                    residual = _joined(there, residual)
                self._kept[name] = residual

    def state_dict(self) -> dict[str, Any]:
        """Return the residuals as plain values and tensors."""
        with self._lock:
            return {n: {**vars(r), "tensors": dict(r.tensors)} for n, r in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the residuals of a state in place of one's own, as the weights go back with them.

        Raises:
            InputError: The state is something else; nothing changes.
        """
        try:
            read = {str(n): _read(value) for n, value in state.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise expected("residuals from Guard.state_dict", repr(error)) from error
        with self._lock:
            self._kept = read


class _Passage:
    """One update on its way: which residuals it took up, and what it leaves behind."""

    def __init__(self, feedback: Feedback) -> None:
        self.feedback = feedback
        self.taken: dict[str, Residual] = {}
        self.left: dict[str, Residual] = {}

    def fed(self, defense: UpdateDefense, update: Update) -> Update:
        """Return the update with the residual of the defense, if any, added.

        Raises:
            InputError: The residual is of another kind, of a later round or of other tensors.
        """
        kept = self.feedback.take(defense.name)
        if kept is None:
            return update
        self.taken[defense.name] = kept
        now = rounds.current()
        number = -1 if now is None else now.number
        if kept.kind != update.kind:
            raise expected(f"a {kept.kind}, as before", f"a {update.kind}", _BEGIN_ANEW)
        if (number < 0) != (kept.round < 0) or (number >= 0 and number <= kept.round):
            raise expected(
                "no round, as before" if kept.round < 0 else f"a round after {kept.round}",
                "no round" if number < 0 else f"round {number}", _BEGIN_ANEW,
            )  # fmt: skip
        tensors = dict(update.tensors)
        for name, rest in kept.tensors.items():
            if name not in tensors or tensors[name].shape != rest.shape:
                got = tuple(tensors[name].shape) if name in tensors else "none that can be read"
                raise expected(f"{name} of shape {tuple(rest.shape)}", got, _BEGIN_ANEW)
            tensors[name] = tensors[name] + rest.to(tensors[name])
        return replace(update, tensors=tensors)

    def keep(self, defense: UpdateDefense, whole: Update, sent: Update) -> None:
        """Note what the defense cut."""
        now = rounds.current()
        cut = {
            n: (t - sent.tensors[n].to(t)).detach()
            for n, t in whole.tensors.items()
            if n in sent.tensors and t.is_floating_point()
        }
        tensors = {n: t for n, t in cut.items() if bool(t.any())}
        self.left[defense.name] = Residual(whole.kind, -1 if now is None else now.number, tensors)


def _joined(first: Residual, second: Residual) -> Residual:
    """Return two residuals of one client together; of two kinds, the later one."""
    if first.kind != second.kind:
        return second
    tensors = dict(first.tensors)
    for name, rest in second.tensors.items():
        there = tensors.get(name)
        tensors[name] = rest if there is None or there.shape != rest.shape else there + rest
    return Residual(second.kind, max(first.round, second.round), tensors)


def _read(value: Mapping[str, Any]) -> Residual:
    tensors = {str(n): t for n, t in value["tensors"].items()}
    wrong = [n for n, t in tensors.items() if not isinstance(t, Tensor) or not t.isfinite().all()]
    if wrong or value["kind"] not in ("gradient", "difference"):
        raise ValueError(f"{wrong[:1] or value['kind']}")
    return Residual(value["kind"], int(value["round"]), tensors)
