"""Which cases of a test the fast suite runs: the others are slow, and run in the full one."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def fast_for(cases: Iterable[Any], *, fast: Collection[Any]) -> list[Any]:
    """Return all cases, those that are not among `fast` marked slow."""
    return [c if c in fast else pytest.param(c, marks=pytest.mark.slow) for c in cases]


def crossed(*axes: Iterable[Any], rounds: int = 1) -> list[Any]:
    """Return all combinations of some axes; a few in which every value stands are fast.

    Each value of the longest axis stands in `rounds` of them, each other value at least as often,
    and the values go round beside each other. The rest is slow: the same code on more pairs.
    """
    values = [list(axis) for axis in axes]
    cases = list(itertools.product(*(range(len(axis)) for axis in values)))
    met: collections.Counter[Any] = collections.Counter()  # how often values and pairs of them

    def parts(case: tuple[int, ...]) -> list[Any]:
        places = list(enumerate(case))
        return [*places, *itertools.combinations(places, 2)]

    fast: set[tuple[int, ...]] = set()
    for _ in range(rounds * max(map(len, values))):
        left = (case for case in cases if case not in fast)
        chosen = min(left, key=lambda case: sum(met[part] for part in parts(case)))
        met.update(parts(chosen))
        fast.add(chosen)
    return [
        pytest.param(
            *(axis[index] for axis, index in zip(values, case, strict=True)),
            marks=() if case in fast else pytest.mark.slow,
        )
        for case in cases
    ]
