"""Tests of what a protected model promises; names load when they are used.

from vitguard.testing import assert_not_reconstructable
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Guarantee": "vitguard.testing.guarantees",
    "Inconclusive": "vitguard.errors",
    "assert_checkpoint_compatible": "vitguard.testing.assertions",
    "assert_epsilon_not_exceeded": "vitguard.testing.mechanisms",
    "assert_eval_unchanged": "vitguard.testing.assertions",
    "assert_fails_closed": "vitguard.testing.mechanisms",
    "assert_not_reconstructable": "vitguard.testing.assertions",
    "assert_removable": "vitguard.testing.assertions",
    "assert_round_trip": "vitguard.testing.mechanisms",
    "assert_sealed": "vitguard.testing.mechanisms",
    "assert_sensitivity": "vitguard.testing.mechanisms",
    "check_defense": "vitguard.testing.defense_contracts",
    "guarantees_of": "vitguard.testing.guarantees",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitguard.testing' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
