"""What was spent: a ledger of releases as plain data, and epsilon from it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

from vitguard.core import Traits
from vitguard.errors import expected, missing_extra

__all__ = ["Ledger", "PrivacySpent", "gaussian_delta", "gaussian_epsilon", "noise_for"]

Accountant = Literal["prv", "rdp"]
_ACCOUNTANTS = ("prv", "rdp")
_MOST_POINTS = 1 << 22  # of the PRV accountant's mesh: 32 MiB an array
_SMALLEST = 0.01  # noise: below it accountants leave the range they were made for, or never end
_LARGEST = 1e6  # signal over noise whose epsilon is computed exactly
_FARTHEST = 700.0  # privacy losses beyond it overflow where the accountant takes their exponential


_forked = threading.Lock()
"""Held by the thread of a fork that begins a ledger anew, while others wait."""


def _renew() -> None:
    global _forked
    _forked = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@dataclass(frozen=True)
class PrivacySpent:
    """What the releases of a ledger add up to: (epsilon, delta) for adding or removing one record.

    Under `ClientPrivacy` the record is the client's whole data set. Batch sizes and the number of
    records are public. `epsilon` is infinite when a release carried no noise, or noise that is no
    secret; `note` says why then.
    """

    epsilon: float
    delta: float
    steps: int
    accountant: str
    note: str = ""

    def __str__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        return (
            f"epsilon {self.epsilon:.3g} at delta {self.delta:.3g} after {self.steps} steps "
            f"({self.accountant}{note})"
        )


Entry = tuple[float, float, int]


class Ledger:
    """Every release of the subsampled Gaussian mechanism, in order. It only grows.

    Each process, copy and fork writes under a name of its own, so that ledgers which went apart can
    be joined again: of each name the longer history counts.

    Args:
        history: Entries (noise multiplier, sampling rate, steps) to begin with.

    Guarantees:
        Composition over rounds and checkpoints: a ledger that was saved and loaded continues, and
        rounds of any length spend what one run of the same steps spends.
        Loading never shortens it. Threads that record at once are all counted.

    Does not protect against:
        A process that starts anew from an old checkpoint: what was released after that checkpoint
        is known only to whoever has the later one.
    """

    def __init__(self, history: Sequence[Entry] = ()) -> None:
        self._runs: dict[str, list[Entry]] = {}
        self._void = ""
        self._begin()
        for entry in history:
            self.record(*entry)

    def _begin(self) -> None:
        """Write under a fresh name from now on."""
        self._name, self._lock = secrets.token_hex(16), threading.RLock()
        self._process = os.getpid()  # last: who sees it sees the rest

    def __repr__(self) -> str:
        return f"Ledger({self.history})"

    def __getstate__(self) -> dict[str, Any]:
        with self.locked():
            return {"runs": {k: [*v] for k, v in self._runs.items()}, "void": self._void}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._runs, self._void = state["runs"], state["void"]
        self._begin()

    def locked(self) -> AbstractContextManager[Any]:
        """Hold the ledger: what is read and written inside the block is one act."""
        if self._process != os.getpid():  # a fork: another thread's lock would never open here
            with _forked:
                if self._process != os.getpid():
                    self._begin()
        return self._lock

    @property
    def history(self) -> list[Entry]:
        """All entries (noise multiplier, sampling rate, steps); equal neighbours are together."""
        with self.locked():
            entries: list[Entry] = []
            for run in self._runs.values():
                for entry in run:
                    _append(entries, entry)
            return entries

    @property
    def steps(self) -> int:
        """Number of releases."""
        return sum(steps for _, _, steps in self.history)

    @property
    def void(self) -> str:
        """Why the releases have no guarantee whatever their noise, "" where they have."""
        return self._void

    def record(self, noise: float, rate: float, steps: int = 1) -> None:
        """Add releases with noise of standard deviation `noise * clip` and Poisson rate `rate`.

        Raises:
            InputError: A value is out of range; nothing is recorded.
        """
        if not 0 <= noise < math.inf or not 0 < rate <= 1 or steps < 0:
            raise expected(
                "a finite noise of at least 0, a rate in (0, 1] and steps of at least 0",
                f"{noise}, {rate}, {steps}",
            )
        with self.locked():
            if steps:
                entry = (float(noise), float(rate), int(steps))
                _append(self._runs.setdefault(self._name, []), entry)

    def spend(
        self,
        noise: float,
        rate: float,
        *,
        admit: Callable[[Ledger], None] | None = None,
        void: str = "",
    ) -> None:
        """Record one release before it leaves, if `admit` lets the longer ledger pass.

        Args:
            admit: Called with the ledger as it would be; what it raises goes on, and nothing is
                recorded. No other thread records in between.
            void: Why this release has no guarantee, such as draws that are no secret.
        """
        with self.locked():
            if admit is not None:
                longer = Ledger(self.history)
                longer.record(noise, rate)
                admit(longer)
            self.record(noise, rate)
            self._void = self._void or void

    def spent(self, delta: float, accountant: str = "prv") -> PrivacySpent:
        """Return epsilon at `delta` in (0, 1).

        Releases without subsampling compose exactly (Balle and Wang, arXiv:1805.06530); the others
        by Opacus's accountant, whose upper bound is returned. What `void` says is left out of it:
        `statement` is what a user is told.
        """
        if not 0 < delta < 1:
            raise expected("delta in (0, 1)", delta)
        if accountant not in _ACCOUNTANTS:
            raise expected(f"accountant among {', '.join(_ACCOUNTANTS)}", repr(accountant))
        history = self.history
        steps = sum(n for _, _, n in history)
        if not history:
            return PrivacySpent(0.0, delta, 0, accountant)
        if any(noise == 0 for noise, _, _ in history):
            note = "a release carried no noise"
            return PrivacySpent(math.inf, delta, steps, accountant, note)
        if all(rate == 1 for _, rate, _ in history):
            return PrivacySpent(_unsampled(history, delta), delta, steps, "gaussian")
        merged: dict[tuple[float, float], int] = {}  # order does not matter to epsilon
        for noise, rate, n in history:
            merged[noise, rate] = merged.get((noise, rate), 0) + n
        entries = [(*key, n) for key, n in merged.items()]
        return PrivacySpent(_epsilon(entries, delta, accountant), delta, steps, accountant)

    def statement(self, delta: float, accountant: str = "prv") -> PrivacySpent:
        """Return `spent`, infinite where a release has no guarantee."""
        if not self._void:
            return self.spent(delta, accountant)
        return PrivacySpent(math.inf, delta, self.steps, accountant, f"void: {self._void}")

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger as plain numbers, strings and lists."""
        state = self.__getstate__()
        runs = {name: [list(entry) for entry in run] for name, run in state["runs"].items()}
        return {"version": 2, "runs": runs, "void": state["void"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Join a `state_dict`: of each process, copy and fork the longer history counts.

        Raises:
            InputError: The state is not one of a ledger, or lacks releases that this ledger counted
                and has none of its own; the ledger is unchanged.
        """
        try:
            runs, void = _runs_of(state), str(state.get("void", ""))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise expected("a state from Ledger.state_dict", repr(error)) from error
        with self.locked():
            joined = {name: [*run] for name, run in self._runs.items()}
            for name, run in runs.items():
                mine = joined.get(name, [])
                if _begins(mine, run):
                    joined[name] = run
                elif not _begins(run, mine):  # one name, two histories: both happened
                    joined[f"{name}+{_digest(run)}"] = run
            before, after = (sum(map(_steps, r.values())) for r in (self._runs, joined))
            there = sum(map(_steps, runs.values()))
            if after == before and there < before:
                raise expected(
                    f"a ledger that holds the {before} releases counted here",
                    f"an older one of {there}",
                    "A release stays counted when weights go back: load the weights alone, or the "
                    "state of the guard that was saved last.",
                )
            self._runs, self._void = joined, self._void or void


def _append(run: list[Entry], entry: Entry) -> None:
    noise, rate, steps = entry
    if run and run[-1][:2] == (noise, rate):
        run[-1] = (noise, rate, run[-1][2] + steps)  # at once: a fork may copy it at any moment
    else:
        run.append(entry)


def _steps(run: Sequence[Entry]) -> int:
    return sum(steps for _, _, steps in run)


def _begins(start: Sequence[Entry], run: Sequence[Entry]) -> bool:
    """Whether `run` is `start` with releases added."""
    if not start:
        return True
    last = len(start) - 1
    return (
        len(run) > last
        and list(run[:last]) == list(start[:last])
        and run[last][:2] == start[last][:2]
        and run[last][2] >= start[last][2]
    )


def _digest(run: Sequence[Sequence[float]]) -> str:
    return hashlib.sha256(json.dumps(run).encode()).hexdigest()[:16]


def _runs_of(state: Mapping[str, Any]) -> dict[str, list[Entry]]:
    """Return the histories by name of a state, checked entry by entry."""
    if state["version"] == 1:  # one history without a name
        named = {f"version 1, {_digest(state['history'])}": state["history"]}
    elif state["version"] == 2:
        named = state["runs"]
    else:
        raise expected("a ledger of version 1 or 2", state["version"])
    runs = {}
    for name, history in named.items():
        checked = Ledger([(float(n), float(r), int(k)) for n, r, k in history])
        runs[str(name)] = checked.history
    return {name: run for name, run in runs.items() if run}


def _epsilon(history: Sequence[tuple[float, float, int]], delta: float, accountant: str) -> float:
    try:
        from opacus.accountants import PRVAccountant
    except ImportError as error:
        raise missing_extra("Privacy accounting", "opacus") from error
    if any(noise < _SMALLEST for noise, _, _ in history):
        return _unsampled(history, delta)
    try:
        bound = _renyi(history, delta)
    except (ArithmeticError, ValueError):
        return _unsampled(history, delta)
    if not (math.isfinite(bound) and bound >= 0):
        return _unsampled(history, delta)
    if accountant == "rdp":
        return bound
    prv = PRVAccountant()
    prv.history = list(history)
    # Opacus's default error of 0.01 would be most of a small epsilon and nothing of a large one.
    error = min(0.5, max(1e-4, min(5e-3 * bound, 1e-2), 1e-3 * bound))
    # Its mesh reaches about as far as the RDP bound at delta / 4000; memory grows with the points.
    reach, steps = _renyi(history, delta / 4000), sum(n for _, _, n in history)
    mesh = error / math.sqrt(steps * math.log(12_000 / delta) / 2)
    if not (reach < _FARTHEST and 2 * reach / mesh < _MOST_POINTS):
        return bound
    try:
        epsilon = float(prv.get_epsilon(delta=delta, eps_error=error))
    except (RuntimeError, ValueError, FloatingPointError, MemoryError):
        return bound  # the discretisation does not fit; RDP is an upper bound as well
    return min(epsilon, bound) if math.isfinite(epsilon) and epsilon >= 0 else bound


def _renyi(history: Sequence[Entry], delta: float) -> float:
    """Return the epsilon of Opacus's RDP accountant."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = sum(n * _curve(noise, rate) for noise, rate, n in history)
    return float(get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=total, delta=delta)[0])


@functools.lru_cache(maxsize=4096)  # schedules have a noise for each step
def _curve(noise: float, rate: float) -> Any:
    """Return the Renyi divergences of one release: steps of one kind add up to their multiple."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    return compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders)


def _unsampled(history: Sequence[Entry], delta: float) -> float:
    """Return epsilon where every record takes part in every release: exact, or an upper bound.

    Poisson sampling mixes the neighbour's distribution with the record's own absence, and the
    hockey-stick divergence is jointly convex, so it never spends more.
    """
    mu = math.sqrt(sum(n * (1 / noise) * (1 / noise) for noise, _, n in history))
    return gaussian_epsilon(mu, delta)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the exact delta of a Gaussian mechanism with sensitivity / deviation `mu`.

    Reference: Balle and Wang, arXiv:1805.06530, theorem 8.
    """
    from scipy.special import log_ndtr, ndtr

    first = float(ndtr(mu / 2 - epsilon / mu))
    return first - math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the exact epsilon at `delta` of a Gaussian mechanism with the given `mu`.

    To rounding, and `gaussian_delta` there is at most `delta`. Beyond a `mu` of a million, where
    float64 loses it, the bound of concentrated privacy (arXiv:1605.02065, proposition 1.3).
    """
    if mu > _LARGEST:
        return mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    if mu == 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, high * 2
    return _least(lambda epsilon: gaussian_delta(mu, epsilon) - delta, low, high, precision=1e-15)


@functools.lru_cache(maxsize=64)
def noise_for(
    epsilon: float, delta: float, rate: float, steps: int, accountant: str = "prv"
) -> float:
    """Return the smallest noise multiplier from 0.05, to 0.1 %, that spends at most `epsilon`.

    Raises:
        InputError: Even a noise multiplier of 10000 spends more.
    """

    def excess(noise: float) -> float:
        ledger = Ledger()
        ledger.record(noise, rate, steps)
        spent = ledger.spent(delta, accountant).epsilon
        return (spent - epsilon) / (spent + epsilon) if 0 < spent < math.inf else spent - epsilon

    low, high = 0.05, 1.0  # below it accountants leave the range they were made for
    while excess(high) > 0:
        low, high = high, high * 2
        if high > 1e4:
            raise expected("an epsilon that noise can reach", f"{epsilon} at delta {delta}")
    if low < 1 and excess(low) <= 0:
        return low
    return _least(excess, low, high, precision=1e-3)


def noisy(before: Traits, noise: float) -> Traits:
    """Return the traits of a release that is clipped and gets noise of `noise` times the clip."""
    if noise == 0:
        return before
    told = min(before.information, 1 / (2 * noise**2))
    return replace(before, exact=False, information=told, rank=0)


def _least(excess: Callable[[float], float], low: float, high: float, *, precision: float) -> float:
    """Return about the least value at which `excess` falls to 0, never one where it is above.

    Args:
        excess: Above 0 at `low`, not above 0 at `high`.
        low, high: The bracket.
        precision: How far the value may be above the least one, relative to it.
    """
    from scipy.optimize import brentq

    safe = high

    def watched(value: float) -> float:
        nonlocal safe
        left = excess(value)
        if left <= 0:
            safe = min(safe, value)
        return left

    smallest = 4 * sys.float_info.epsilon  # that `brentq` takes
    near, rest = precision * low + 5e-324, max(precision / 2, smallest)
    brentq(watched, low, high, xtol=near, rtol=rest, maxiter=500, disp=False)  # type: ignore[arg-type]
    return safe
