"""Names and settings from the command line, and third parties' classes."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar, Literal

import pytest
import torch

from vitguard import discovery, registry
from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.budget import CutShort
from vitguard.attacks.fgsm import FGSM
from vitguard.attacks.ladder import Ladder
from vitguard.attacks.position import PositionInversion
from vitguard.attacks.span import SpanInversion
from vitguard.audit import audit
from vitguard.core import Guess
from vitguard.defenses.base import UpdateDefense
from vitguard.defenses.noise import GradientNoise
from vitguard.defenses.positions import FixedPositions
from vitguard.errors import InputError


@pytest.mark.parametrize(
    ("spec", "stack"),
    [
        ("none", []),
        ("positions", [FixedPositions()]),
        (" positions:kind=frozen ", [FixedPositions("frozen")]),
        ("noise:scale=1e+2,keep_statistics=yes", [GradientNoise(100.0, True)]),
        ("positions:kind=none+noise:scale=1e-3", [FixedPositions("none"), GradientNoise(1e-3)]),
    ],
)
def test_a_spec_is_its_stack(spec, stack):
    assert registry.parse_stack(spec) == stack
    assert registry.parse_stack(registry.stack_name(stack)) == stack


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("position", "'position'"),
        ("", "''"),
        ("positions:", None),
        ("positions:kind", "'kind'"),
        ("positions:sort=frozen", "'sort=frozen'"),
        ("positions:kind=thawed", "'thawed'"),
        ("noise:scale=loud", "'loud'"),
        ("noise:scale=nan", "nan"),
        ("noise:scale=-1", "-1"),
        ("noise:keep_statistics=maybe", "'maybe'"),
        ("positions+", "''"),
        ("none+noise", "'none'.*stands alone"),
        ("none:ratio=1", "'none:ratio=1'.*stands alone"),
    ],
)
def test_a_wrong_spec_names_the_value(spec, named):
    if named is None:
        assert registry.parse_stack(spec) == [FixedPositions()]
        return
    with pytest.raises(InputError, match=named):
        registry.parse_stack(spec)


def test_attacks_by_name_and_group_once_each():
    found = registry.parse_attacks(["span", "closed-form", "span"])
    assert found[0] == SpanInversion() and found.count(SpanInversion()) == 1
    assert PositionInversion() in found and all(a.family == "closed-form" for a in found)
    everything = registry.parse_attacks("all")
    assert {a.name for a in everything} == set(registry.attack_types())
    other = SpanInversion(smooth_iterations=5)
    assert registry.parse_attack("span:smooth_iterations=5") == other
    with pytest.raises(InputError, match="closed-form"):
        registry.parse_attacks("spam")


def test_attacks_that_compare_equal_all_run():
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    asked = [FGSM(), FGSM(surrogate=first), FGSM(surrogate=second)]
    assert asked[0] == asked[1] == asked[2]
    found = registry.parse_attacks([asked[1], "fgsm", *asked, "fgsm"])
    assert [a.surrogate for a in found] == [first, None, None, second]
    assert found[0] is asked[1] and found[2] is asked[0] and found[3] is asked[2]


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ("matching:iterations=3", "one attack, got 'matching:iterations=3'. A group takes no sett"),
        (["span", "all:seconds=2"], "one attack, got 'all:seconds=2'. A group takes no settings"),
        ("spam", r"^Expected one attack among (?!.*ladder.*ladder).*ladder.*, all, got 'spam'"),
        (["span", 5], "Expected attacks, got 5"),
        (SpanInversion, "instances, not classes"),
    ],
)
def test_what_is_no_attack_is_told_from_a_group_with_settings(specs, said):
    with pytest.raises(InputError, match=said):
        registry.parse_attacks(specs)


def test_on_a_cpu_a_name_means_the_preset_unless_it_sets_iterations():
    named = {a.name: a for a in registry.parse_attacks(["matching", "span"], fast=True)}
    for name, attack in named.items():
        cls = registry.attack_types()[name]
        preset = getattr(cls, "fast", None)
        assert attack == (preset() if preset else cls())
        assert registry.parse_attack(name) == cls()
    assert named["gradvit"].budget is not None and named["gradvit"].iterations < 1000
    (kept,) = registry.parse_attacks("gradvit:restarts=3", fast=True)
    assert kept.restarts == 3 and kept.iterations == named["gradvit"].iterations
    (whole,) = registry.parse_attacks("gradvit:iterations=120000", fast=True)
    assert whole == registry.parse_attack("gradvit") and whole.budget is None


def test_ladder_is_one_attack_and_stands_for_the_closed_forms():
    (ladder,) = registry.parse_attacks("ladder")
    assert ladder.name == "ladder"
    assert registry.families_not_run([ladder]) == ("matching", "input")
    assert registry.families_not_run([SpanInversion()]) == ("ladder", "matching", "input")


@pytest.mark.parametrize(
    ("read", "near"),
    [
        (lambda: registry.parse_stack("postions"), "Did you mean positions"),
        (lambda: registry.parse_stack("withheld-positions"), "Did you mean withheld"),
        (lambda: registry.parse_stack("shuffle:ration=0.5"), "Did you mean ratio"),
        (lambda: registry.parse_attack("Spann"), "Did you mean span"),
    ],
)
def test_a_slip_of_the_pen_is_told_what_was_meant(read, near):
    with pytest.raises(InputError, match=near):
        read()


def test_every_group_has_an_attack_or_is_not_offered_empty():
    families = {t.family for t in registry.attack_types().values()}
    assert families <= set(registry.GROUPS)


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        ("none", float | None, None),
        ("0.5", float | None, 0.5),
        ("a", Literal["a", "b"], "a"),
        ("2", Literal[1, 2], 2),
        ("1/2/3", tuple[int, ...], (1, 2, 3)),
        ("TRUE", bool, True),
        ("none", str, "none"),
    ],
)
def test_values_are_read_by_their_annotation(text, hint, value):
    assert registry.parse_value(text, hint, "x") == value


@pytest.mark.parametrize(
    ("text", "hint"), [("3.5", int), ("x", float), ("x", bool), ("x", torch.Tensor)]
)
def test_values_that_do_not_fit_are_refused(text, hint):
    with pytest.raises(InputError, match="x"):
        registry.parse_value(text, hint, "x")


@dataclass(frozen=True)
class Theirs(Attack):
    """A third party's attack."""

    name: ClassVar[str] = "theirs"
    family: ClassVar[str] = "closed-form"
    needed: int

    def run(self, view, generator):
        return Guess(torch.zeros(1, *view.image_shape))


@dataclass(frozen=True)
class Impostor(Attack):
    """An attack that would stand in for a built-in one, and find nothing."""

    name: ClassVar[str] = "span"
    family: ClassVar[str] = "closed-form"

    def run(self, view, generator):
        return Guess(torch.zeros(1, *view.image_shape))


class TheirDefense(UpdateDefense):
    name = "their-defense"

    def seal(self, update, anatomy, draws):
        return update


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages registered these entry points."""

    def install(**points):
        def find(group):
            return [
                EntryPoint(n, f"{__name__}:{v}", group)
                for n, (g, v) in points.items()
                if g == group
            ]

        monkeypatch.setattr(discovery, "entry_points", find)
        registry.attack_types.cache_clear()
        registry.defense_types.cache_clear()

    yield install
    monkeypatch.undo()
    registry.attack_types.cache_clear()
    registry.defense_types.cache_clear()


def test_third_parties_are_found_by_entry_point(installed):
    installed(a=("vitguard.attacks", "Theirs"), d=("vitguard.defenses", "TheirDefense"))
    assert registry.parse_attack("theirs:needed=3") == Theirs(3)
    assert registry.defense_types()["their-defense"] is TheirDefense
    with pytest.raises(InputError, match=r"needed=\.\.\."):
        registry.parse_attack("theirs")


@dataclass(frozen=True)
class TheirRung(Attack):
    """A rung of a third party, cheaper than any of vitguard's."""

    name: ClassVar[str] = "their-rung"
    family: ClassVar[str] = "closed-form"
    rung: ClassVar[Rung | None] = Rung(1, 1)

    def run(self, view, generator):
        return PositionInversion().run(view, generator)


def test_the_ladder_climbs_the_rung_of_a_third_party(installed, small_vit, observe, photo):
    climb = observe(small_vit(), photo), torch.Generator()
    assert Ladder().run(*climb).details["rung"] == "position"
    installed(a=("vitguard.attacks", "TheirRung"))
    found = Ladder().run(*climb).details
    assert found["rung"] == "their-rung"
    assert found["outcomes"] == {"their-rung": "ran"}
    parts = list(Ladder().parts())
    assert parts[0] == "their-rung" and "position" in parts


@pytest.mark.parametrize("wrong", ["Impostor", "torch"])
def test_an_entry_point_cannot_replace_an_attack_or_be_something_else(installed, wrong):
    installed(a=("vitguard.attacks", wrong))
    with pytest.raises(InputError):
        registry.attack_types()


@dataclass(frozen=True)
class Breaks(TheirRung):
    name: ClassVar[str] = "breaks"

    def run(self, view, generator):
        raise RuntimeError("out of ideas")


@pytest.mark.slow
def test_a_rung_that_breaks_takes_no_other_with_it_and_earns_no_resistance(
    installed, small_vit, observe, photo
):
    installed(a=("vitguard.attacks", "Breaks"))
    found = Ladder().run(observe(small_vit(), photo), torch.Generator()).details
    assert found["rung"] == "position" and found["outcomes"]["breaks"] == "failed"
    assert found["rungs"]["breaks"] == "it failed: RuntimeError: out of ideas"
    batch = photo, torch.tensor([1])
    report = audit(small_vit(), batch, defenses="noise:scale=3", attacks="ladder:seconds=9")
    finding = report.findings[-1]
    assert finding.verdict == "inconclusive" and finding.reason.startswith("breaks failed")
    assert report.gate(max_gain=6) == 3


def test_where_nothing_but_a_broken_rung_is_left_no_assumption_is_blamed(
    monkeypatch, small_vit, observe, photo
):
    monkeypatch.setattr(Ladder, "parts", lambda self: {"breaks": Breaks()})
    with pytest.raises(CutShort, match="breaks: it failed"):
        Ladder().run(observe(small_vit(), photo), torch.Generator())


class Nameless(Attack):
    family: ClassVar[str] = "closed-form"

    def run(self, view, generator):
        raise NotImplementedError


class Abstract(Attack):
    name: ClassVar[str] = "abstract"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("Missing", "a module that imports"), ("Nameless", "with a name"), ("Abstract", "with run")],
)
def test_a_broken_entry_point_is_named(installed, wrong, said):
    installed(a=("vitguard.attacks", wrong))
    with pytest.raises(InputError, match=rf"{said} at entry point a \(.*{wrong}\)"):
        registry.attack_types()
