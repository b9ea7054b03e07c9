"""Knowing less never makes an attack's verdict stronger, and what it calls proved is right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from vitguard.attacks.base import Attack
from vitguard.attacks.position import PositionInversion
from vitguard.core import Guess
from vitguard.errors import Blocked, Inconclusive
from vitguard.models import AprilViT
from vitguard.registry import attack_types
from vitguard.testing.weakening import check_proofs, check_weaker, less_work

EXACT = [
    n for n, t in attack_types().items() if getattr(t, "family", "") in ("closed-form", "ladder")
]
QUICK = ("april", "gelu-span", "position", "span")


NOTHING = {
    "cascade": "recovers labels, no image",
    "containment": "matrices are sent whole",
    "imprint": "the server wrote no bins",
}
"""Exact attacks that do not work on so small a model with a plain gradient, and why."""


def built(name, seconds=2.0):
    attack = attack_types()[name]()
    return replace(attack, seconds=seconds) if less_work(attack) else attack


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in EXACT]
)
def test_an_attack_that_misses_a_tensor_or_is_cut_is_never_said_to_be_resisted(name):
    model = AprilViT(8, 4, 64, 2, 2, 3) if name == "april" else None
    if name not in NOTHING:
        return check_weaker(built(name), model)
    with pytest.raises(Inconclusive, match=f"Nothing was shown of {name}.*{NOTHING[name]}"):
        check_weaker(built(name), model)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in EXACT]
)
def test_a_patch_that_an_attack_calls_proved_is_right_under_noise_too(name):
    check_proofs(built(name, 0.5 if name == "map" else 2.0))  # `map` proves nothing, then or later


def grey(view, **about):
    return Guess(torch.full((1, *view.image_shape), 0.5), **about)


@dataclass(frozen=True)
class Silent(Attack):
    """Finds the image, and returns grey without a word where it cannot."""

    name: ClassVar[str] = "silent"
    family: ClassVar[str] = "closed-form"
    seconds: float = 1.0
    quiet: str = ""

    def run(self, view, generator):
        try:
            if self.quiet == "never":
                return grey(view)
            if self.seconds < 0.1:
                told = {} if self.quiet == "cut" else {"unfinished": ["the search"]}
                return grey(view, details=told)
            guess = PositionInversion().run(view, generator)
        except Blocked:
            if self.quiet != "blocked":
                raise
            return grey(view)
        if self.quiet == "proved":
            return replace(guess, images=guess.images * 0, verified=torch.ones(1, 4) > 0)
        return guess


def test_an_attack_that_never_works_is_inconclusive_and_not_green():
    with pytest.raises(Inconclusive, match="Nothing was shown of silent"):
        check_weaker(Silent(quiet="never"))


@pytest.mark.slow
def test_an_attack_that_says_what_it_misses_passes():
    check_weaker(Silent())
    check_proofs(Silent())


@pytest.mark.parametrize(
    ("quiet", "why"), [("blocked", "patch is hidden"), ("cut", "its budget cut it")]
)
def test_an_attack_that_fails_in_silence_is_found(quiet, why):
    with pytest.raises(AssertionError, match=f"resisted though {why}; with all it needs it leaks"):
        check_weaker(Silent(quiet=quiet))


def test_an_attack_that_proves_what_is_wrong_is_found():
    with pytest.raises(AssertionError, match="calls 4 of 4 patches proved that are wrong"):
        check_proofs(Silent(quiet="proved"))
