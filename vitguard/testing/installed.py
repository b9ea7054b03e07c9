"""Tests of every installed defense and attack: `pytest --pyargs vitguard.testing.installed`."""

from __future__ import annotations

from typing import Any

import pytest

from vitguard.errors import Inconclusive
from vitguard.registry import attack_types, defense_types
from vitguard.testing import contracts, defense_contracts, weakening

_EXACT = [n for n, t in attack_types().items() if t.family in ("closed-form", "ladder")]


@pytest.mark.parametrize("check", defense_contracts.CHECKS)
@pytest.mark.parametrize("name", defense_types())
def test_defense(name: str, check: str) -> None:
    """One contract of one installed defense."""
    defense_contracts.CHECKS[check](defense_types()[name]())  # type: ignore[operator]


@pytest.mark.parametrize("name", [*defense_types(), *attack_types()])
def test_settings(name: str) -> None:
    """The settings of one installed defense or attack."""
    contracts.check_settings({**defense_types(), **attack_types()}[name])


@pytest.mark.parametrize("name", _EXACT)
def test_attack(name: str) -> None:
    """What one exact attack says of itself where it knows less; matching takes too long here."""
    attack: Any = attack_types()[name]()
    weakening.check_proofs(attack)
    try:
        weakening.check_weaker(attack)
    except Inconclusive as nothing:
        pytest.skip(str(nothing))
