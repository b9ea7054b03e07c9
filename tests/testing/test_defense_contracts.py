"""The contracts hold for what is installed, and find bugs of a third party without a test of it."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tests.fast import fast_for
from vitguard.core import Traits
from vitguard.defenses.base import UpdateDefense
from vitguard.defenses.privacy import ClientPrivacy, DifferentialPrivacy
from vitguard.errors import Incompatible
from vitguard.registry import defense_types
from vitguard.testing import check_defense
from vitguard.testing.defense_contracts import CHECKS, check_composes

ROOT = Path(__file__).parents[2]
TYPES = defense_types()
COSTLY = {"privacy": 0, "gate": 1}
NAMES = sorted(TYPES, key=lambda name: COSTLY.get(name, 2))
FAST = ["privacy", "noise", "pruning", "shuffle", "frozen-stem", "encryption", "masking"]

BUGS = '''
import torch
from dataclasses import dataclass, replace
from typing import ClassVar
from vitguard.core import Shuffle
from vitguard.defenses.base import Installed, ModelDefense, UpdateDefense

@dataclass(frozen=True)
class BatchNoise(UpdateDefense):
    """Noise that is divided by the batch size once too often.

    Guarantees:
        None.
    """

    name: ClassVar[str] = "batch-noise"
    scale: float = 1.0

    def __post_init__(self):
        if not 0 <= self.scale < float("inf"):
            from vitguard.errors import expected
            raise expected("a finite scale", self.scale)

    def traits(self, before, anatomy):
        return replace(before, exact=False, noise=self.scale)

    def seal(self, update, anatomy, draws):
        def noised(t):
            level = self.scale * t.square().mean().sqrt() / DIVISOR
            return t + level * draws.normal(t.shape, like=t)
        return replace(update, tensors={n: noised(t) for n, t in update.tensors.items()})

class Rolled(Installed):
    def __init__(self, first, model):
        super().__init__()
        self.handle = model.get_submodule("blocks.0").register_forward_pre_hook(Roll(first))

    def uninstall(self, model):
        self.handle.remove()

class Roll:
    def __init__(self, first):
        self.first = first

    def __call__(self, module, args):
        if not module.training:
            return None
        head, rest = args[0][:, :self.first], args[0][:, self.first:]
        return (torch.cat([head, rest.roll(1, 1)], 1),)

@dataclass(frozen=True)
class TokenShuffle(ModelDefense):
    """A shuffle that takes the class token for a patch.

    Guarantees:
        None.
    """

    name: ClassVar[str] = "token-shuffle"

    def traits(self, before, anatomy):
        return replace(before, shuffle=Shuffle(most=anatomy.patches))

    def install(self, model, anatomy, draws):
        return Rolled(FIRST, model)
'''


MODULES = {
    "buggy": BUGS.replace("DIVISOR", "update.batch_size").replace("FIRST", "0"),
    "sound": BUGS.replace("DIVISOR", "1")
    .replace("FIRST", "anatomy.prefix_tokens")
    .replace('"batch-noise"', '"sound-noise"')
    .replace('"token-shuffle"', '"sound-shuffle"'),
}


@pytest.fixture
def said(tmp_path):
    """What the contracts say of a package with these four defenses, in a process of its own."""
    points = []
    for name, text in MODULES.items():
        (tmp_path / f"{name}_theirs.py").write_text(text)
        points += [f"{name}_{c} = {name}_theirs:{c}" for c in ("BatchNoise", "TokenShuffle")]
    info = tmp_path / "theirs-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("\n".join(["[vitguard.defenses]", *points]) + "\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    chosen = "batch-noise or token-shuffle or sound-noise or sound-shuffle"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rf",
         "--pyargs", "vitguard.testing.installed", "-k", chosen],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", fast_for(NAMES, fast=FAST))
def test_an_installed_defense_does_what_its_traits_say(name):
    """Beside those that are listed before it: each pair once, in either order."""
    before = NAMES[: NAMES.index(name)]
    check_defense(TYPES[name](), [TYPES[n]() for n in before if n != "gate"])


@pytest.mark.slow  # the gate attacks every update; beside privacy it stands above
@pytest.mark.parametrize("name", sorted({*NAMES} - {"gate", "privacy"}))
def test_the_gate_composes_with_every_defense_or_says_why_not(name):
    check_composes(TYPES["gate"](), [TYPES[name]()])


@pytest.mark.parametrize(
    ("kind", "check", "why"),
    [
        ("BatchNoise", "check_noise", "on a batch of 3"),
        ("TokenShuffle", "check_tokens", "class token"),
    ],
)
def test_a_bug_of_a_third_party_is_found_and_the_same_defense_without_it_is_sound(kind, check, why):
    buggy, sound = {}, {}
    exec(MODULES["buggy"], buggy)
    exec(MODULES["sound"], sound)
    CHECKS[check](sound[kind]())
    with pytest.raises(AssertionError, match=why):
        CHECKS[check](buggy[kind]())


@pytest.mark.slow
def test_two_bugs_of_a_third_party_are_found_without_a_line_of_test_code(said):
    """The same defenses without the bugs, of the same package, pass."""
    failed = {line.split("::")[1].split(" ")[0] for line in said.splitlines() if "FAILED" in line}
    assert failed == {
        "test_defense[batch-noise-check_noise]", "test_defense[token-shuffle-check_tokens]",
    }, said  # fmt: skip
    assert "2 failed, 58 passed" in said, said
    assert "on a batch of 3" in said and "the class token of" in said, said


def test_every_check_has_a_name_and_a_claim():
    assert len(CHECKS) == 14
    assert all(check.__doc__ for check in CHECKS.values())


@dataclass(frozen=True)
class Wrong(UpdateDefense):
    """An update defense that does something to the update and says something of it."""

    name: ClassVar[str] = "wrong"
    does: Callable = field(default=lambda update: update)
    says: Callable = field(default=lambda traits: traits)

    def settings(self):
        return {}

    def check(self, model, anatomy, stack):
        if self.does is refuses and len(stack) > 1:
            raise Incompatible("no")

    def traits(self, before, anatomy):
        return self.says(before)

    def seal(self, update, anatomy, draws):
        return self.does(update)


def refuses(update):
    return update


def prints(update):
    print(update.tensors["head.bias"])  # noqa: T201
    return update


def each(change):
    return lambda update: replace(update, tensors={n: change(t) for n, t in update.tensors.items()})


def loses(update):
    return replace(update, tensors={n: t for n, t in update.tensors.items() if n != "head.bias"})


def adds(update):
    return replace(update, tensors={**update.tensors, "more": torch.ones(1)})


def seals(update):
    return update.seal({"head.bias": "secret"})


def crashes(update):
    raise KeyError("head")


def says(**what):
    return lambda traits: replace(traits, **what)


WRONG = {
    "a parameter is lost": ("check_names", Wrong(loses), "lacks"),
    "a name is made up": ("check_names", Wrong(adds), "names of no parameter"),
    "sealed in silence": ("check_names", Wrong(seals), "do not say so"),
    "not sealed": ("check_names", Wrong(says=says(sealed=("all",))), "can be read"),
    "fixed, yet sent": ("check_names", Wrong(says=says(positions="fixed")), "yet pos_embed"),
    "withheld, yet sent": ("check_names", Wrong(says=says(positions="withheld")), "it is sent"),
    "exact, yet scaled": ("check_values", Wrong(each(lambda t: 1.01 * t)), "off by 0.01"),
    "zeros not told": (
        "check_values", Wrong(each(lambda t: t * (t > 0)), says(exact=False)), "zeroes",
    ),
    "noise claimed, none there": (
        "check_noise", Wrong(says=says(noise=0.1, exact=False)), "has 0 times",
    ),
    "prints a tensor": ("check_quiet", Wrong(prints), "on the screen"),
    "refused without a reason": ("check_composes", Wrong(refuses), "without a reason"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_each_contract_finds_a_defense_that_breaks_it(what):
    check, defense, why = WRONG[what]
    with pytest.raises(AssertionError, match=why):
        CHECKS[check](defense)


@pytest.mark.parametrize("clip", [0.25, 4.0])
def test_noise_is_measured_in_units_of_the_clip(clip):
    """At a clip of 1 nobody sees whether the noise knows it."""
    CHECKS["check_noise"](DifferentialPrivacy(noise=1.0, clip=clip))
    CHECKS["check_noise"](ClientPrivacy(noise=1.0, clip=clip))


def test_a_defense_that_passes_everything_on_but_refuses_nothing_is_sound():
    honest = Wrong()
    assert honest.traits(Traits(), None) == Traits()
    for check in ("check_names", "check_values", "check_noise", "check_quiet"):
        CHECKS[check](honest)
