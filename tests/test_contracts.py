"""The contracts, on everything the registry finds: nobody can forget one."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from vitguard.attacks.base import Attack
from vitguard.core import Guess
from vitguard.defenses.base import UpdateDefense
from vitguard.registry import attack_types, defense_types
from vitguard.testing import contracts

ALL = {**defense_types(), **attack_types()}
LONG = {  # `inverting` stands for the matching attacks, the rungs for their ladder
    "gradinversion",
    "gradvit",
    "ladder",
    "map",
    "april-opt",
    "idlg",
    "dlg",
    "cascade",
    "containment",
    "deep-tokens",
    "gelu-span",
    "span-robust",
    "position-robust",
}  # seconds of processor time each


@pytest.mark.parametrize("name", ALL)
def test_frozen_named_and_documented(name):
    contracts.check_documented(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_round_trips_through_its_spec(name):
    contracts.check_round_trip(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_refuses_settings_that_are_nan(name):
    contracts.check_refuses_nan(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_settings_and_repr_are_plain(name):
    contracts.check_plain(ALL[name]())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LONG else name
        for name, kind in attack_types().items()
        if issubclass(kind, Attack)
    ],
)
def test_any_update_gives_a_finite_image_or_a_reason(name):
    short = {"iterations": 2, "restarts": 1, "seconds": 0.2, "steps": 2, "inner": 5}
    attack = ALL[name]()
    known = {k: v for k, v in short.items() if k in type(attack).__dataclass_fields__}
    contracts.check_attack(replace(attack, **known))


def test_the_registry_found_them():
    assert {"positions", "withheld", "noise", "pruning"} <= set(defense_types())
    assert {"position", "span", "april"} <= set(attack_types())


@dataclass(frozen=True)
class Sloppy(Attack):
    """An attack that breaks every rule it can."""

    name: ClassVar[str] = "sloppy"
    family: ClassVar[str] = "closed-form"
    value: float = 1.0
    images: float = 0.5

    def run(self, view, generator):
        return Guess(torch.full((1, *view.image_shape), self.images))

    def settings(self):
        return {"weights": torch.ones(1)}


def test_the_contracts_find_what_they_are_for():
    with pytest.raises(AssertionError, match="takes NaN as value"):
        contracts.check_refuses_nan(Sloppy)
    with pytest.raises(AssertionError, match="Tensor in its setting weights"):
        contracts.check_plain(Sloppy())
    contracts.check_attack(Sloppy())
    for broken, why in ((math.nan, "not finite"), (1.5, "outside")):
        with pytest.raises(AssertionError, match=why):
            contracts.check_attack(Sloppy(images=broken))

    class Undocumented(UpdateDefense):
        name = "undocumented"

    with pytest.raises(AssertionError, match="frozen dataclass"):
        contracts.check_documented(Undocumented)
