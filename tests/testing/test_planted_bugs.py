"""A bug planted for each part of the contracts that no installed defense breaks, and its twin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch

from vitguard import registry
from vitguard.defenses import protection
from vitguard.defenses.base import Installed, ModelDefense, UpdateDefense
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.guard import Guard
from vitguard.testing import defense_contracts
from vitguard.testing.defense_contracts import (
    check_copies,
    check_fails_closed,
    check_model,
    check_spec,
)

# the spec


@dataclass(frozen=True)
class Scaled(UpdateDefense):
    """Multiplies the update; its spec may forget the factor."""

    name: ClassVar[str] = "scaled"
    factor: float = 1.0
    forgets: ClassVar[bool] = False

    def spec(self):
        return "scaled" if self.forgets else super().spec()

    def seal(self, update, anatomy, draws):
        return update


@pytest.mark.parametrize("forgets", [False, True])
def test_a_spec_that_forgets_a_setting_is_found(monkeypatch, forgets):
    known = {**registry.defense_types(), "scaled": Scaled}
    monkeypatch.setattr(Scaled, "forgets", forgets)
    monkeypatch.setattr(registry, "defense_types", lambda: known)
    monkeypatch.setattr(defense_contracts, "defense_types", lambda: known)
    check_spec(Scaled())
    if not forgets:
        return check_spec(Scaled(0.5))
    with pytest.raises(AssertionError, match=r"scaled reads as .*factor=1\.0.*not as"):
        check_spec(Scaled(0.5))


# the model, and copies of it


class Piece(Installed):
    """What `Marked` leaves on a model: a hook, or what it holds back."""

    def __init__(self, handle, held, *, goes):
        super().__init__()
        self.handle, self.held, self.goes, self.forgets = handle, held, goes, False

    def uninstall(self, model):
        if self.goes:
            self.handle.remove()

    def withheld(self):
        return self.held

    def __getstate__(self):
        return {**self.__dict__, **({"held": {}} if self.forgets else {})}


class Adds:
    def __init__(self, in_eval):
        self.in_eval = in_eval

    def __call__(self, module, args, out):
        return out + 1e-3 if module.training or self.in_eval else None


Bug = Literal["none", "eval", "stays", "renames", "copies"]


@dataclass(frozen=True)
class Marked(ModelDefense):
    """Adds to the output in training, holds the bias of the head back; with a bug or none."""

    name: ClassVar[str] = "marked"
    bug: Bug = "none"

    def traits(self, before, anatomy):
        return before

    def install(self, model, anatomy, draws):
        handle = model.register_forward_hook(Adds(self.bug == "eval"))
        if self.bug == "renames":
            model.head_again = model.head
        piece = Piece(handle, {"head.bias": "held"}, goes=self.bug != "stays")
        piece.forgets = self.bug == "copies"
        return piece


@pytest.mark.parametrize(
    ("bug", "why"),
    [
        ("eval", "changes the output in eval mode"),
        ("stays", "does not undo marked"),
        ("renames", "cannot load what marked:bug=renames exports"),
    ],
)
def test_a_defense_that_changes_the_model_for_good_is_found(bug, why):
    check_model(Marked())
    with pytest.raises(AssertionError, match=why):
        check_model(Marked(bug=bug))


def test_a_copy_that_forgets_what_it_holds_back_is_found():
    check_copies(Marked())
    with pytest.raises(AssertionError, match="an update of a deepcopy under marked has other"):
        check_copies(Marked(bug="copies"))


def test_a_copy_with_other_defenses_is_found(monkeypatch):
    whole = protection.Protection.__getstate__
    monkeypatch.setattr(
        protection.Protection, "__getstate__", lambda self: {**whole(self), "defenses": ()}
    )
    with pytest.raises(AssertionError, match="deepcopy of marked has"):
        check_copies(Marked())


# failing closed


@dataclass(frozen=True)
class OnlyOnce(UpdateDefense):
    """Hides a tensor of the first update it sees, and of no other one."""

    name: ClassVar[str] = "only-once"
    seen: ClassVar[list] = []

    def seal(self, update, anatomy, draws):
        self.seen.append(1)
        return update.seal({"head.bias": "hidden"}) if len(self.seen) == 1 else update


def test_a_defense_that_hides_the_first_update_alone_is_found():
    OnlyOnce.seen.clear()
    with pytest.raises(AssertionError, match="only-once seals other names in seal"):
        check_fails_closed(OnlyOnce())


PRIVACY = DifferentialPrivacy(noise=1.0)
HOLES = {
    "a plain update under privacy is not refused": (
        Guard, "seal", lambda self, update: update,
    ),
    "plain training under privacy is not refused": (
        protection, "_require_preparation", lambda model, args: None,
    ),
    "an update after remove.. of privacy is not refused": (
        Guard, "_in_place", lambda self: [],
    ),
    "a plain update under privacy breaks with KeyError, not Unprotected": (
        Guard, "seal", lambda self, update: {}[""],
    ),
}  # fmt: skip


@pytest.mark.parametrize("hole", HOLES)
def test_each_way_of_not_failing_closed_is_found(monkeypatch, hole):
    monkeypatch.setattr(*HOLES[hole])
    with pytest.raises(AssertionError, match=hole):
        check_fails_closed(PRIVACY)


def test_the_twins_without_a_hole_pass():
    torch.manual_seed(0)
    check_fails_closed(PRIVACY)
    check_fails_closed(Marked())
