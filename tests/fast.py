"""Which cases of a test the fast suite runs: the others are slow, and run in the full one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def fast_for(cases: Iterable[Any], *, fast: Collection[Any]) -> list[Any]:
    """Return all cases, those that are not among `fast` marked slow."""
    return [c if c in fast else pytest.param(c, marks=pytest.mark.slow) for c in cases]
