"""Audits that take long: interrupted, cut short, resumed; and updates whose truth is not known."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from tests.fast import fast_for
from vitguard.attacks.base import Attack
from vitguard.attacks.fgsm import FGSM
from vitguard.attacks.gelu_span.search import Search
from vitguard.attacks.inverting import InvertingGradients
from vitguard.attacks.position import PositionInversion
from vitguard.attacks.span import SpanInversion
from vitguard.audit import LocalTraining, audit
from vitguard.audit.attempts import INTERRUPTED
from vitguard.audit.received import audit_update
from vitguard.core import Guess, Normalization
from vitguard.errors import InputError, LeakFound
from vitguard.guard import Guard, protect

FROZEN = "positions:kind=frozen"


@dataclass(frozen=True)
class Told(Attack):
    """Knows the image; breaks off where told."""

    name: ClassVar[str] = "told"
    family: ClassVar[str] = "closed-form"
    image: torch.Tensor
    how: str = ""
    on_control: bool = False

    def run(self, view, generator):
        if bool(view.settings) == self.on_control:
            return Guess(self.image)
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "index":
            raise IndexError("target -1")
        return Guess(torch.full_like(self.image, 0.5), details={"unfinished": ["the end"]})

    def settings(self):
        return {"how": self.how}


def labelled(pixels):
    return pixels, torch.arange(len(pixels))


def test_an_interrupt_keeps_what_is_done_and_skips_the_rest(small_vit, photo):
    seen: list[int] = []

    def stop(progress):
        seen.append(progress.iteration)
        if len(seen) == 3:
            raise KeyboardInterrupt

    attacks = [PositionInversion(), InvertingGradients(iterations=50, watch=stop), FGSM()]
    report = audit(small_vit(), labelled(photo), defenses=FROZEN, attacks=attacks)
    found = {(f.defense, f.attack): f for f in report.findings}
    assert report.interrupted and any("keyboard interrupt" in note for note in report.notes)
    assert found["none", "position"].verdict == "leaks"
    cut = found["none", "inverting"]
    assert cut.psnr is not None and cut.details["unfinished"] == ["iteration 50"]
    for key in ((FROZEN, "position"), (FROZEN, "inverting"), ("none", "fgsm"), (FROZEN, "fgsm")):
        assert (found[key].verdict, found[key].reason) == ("inconclusive", INTERRUPTED)
    assert len(seen) == 3
    assert report.gate(max_gain=6) == 3


@pytest.fixture
def interruptible():
    """Take SIGINT as at a terminal: a job in the background is begun with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("workers", "iterations"), [(1, 3), (2, 20)])
def test_a_signal_reaches_the_attack_of_one_worker(
    small_vit, photo, workers, iterations, interruptible
):
    seen: list[int] = []

    def signalled(progress):
        seen.append(progress.iteration)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)  # the main thread takes it, as with Ctrl-C

    attack = InvertingGradients(iterations=20, watch=signalled)
    report = audit(small_vit(), labelled(photo), attacks=[attack, FGSM()], workers=workers)
    assert report.interrupted and len(seen) == iterations
    assert report.findings[0].details["iterations"] == iterations
    assert report.findings[-1].reason == INTERRUPTED


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_that_an_attack_does_not_take_loses_nothing(small_vit, photo, workers):
    told = Told(photo, "interrupt")
    report = audit(
        small_vit(), labelled(photo), defenses=FROZEN, attacks=[told, SpanInversion()],
        workers=workers,
    )  # fmt: skip
    found = {(f.defense, f.attack): f for f in report.findings}
    if workers == 1:  # else the control may not have begun
        assert found["none", "told"].verdict == "leaks"
    assert found[FROZEN, "told"].reason == INTERRUPTED
    assert found[FROZEN, "span"].reason == INTERRUPTED and report.interrupted


EXACT = ["ladder:seconds=20", "gelu-span:seconds=20"]


@pytest.mark.slow
@pytest.mark.parametrize("attack", fast_for(EXACT, fast=EXACT[1:]))  # the ladder as its rungs
def test_an_interrupt_of_the_exact_attacks_ends_the_audit(small_vit, photos, attack, monkeypatch):
    run, calls = Search.run, []

    def interrupted(self, rounds):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return run(self, rounds)

    monkeypatch.setattr(Search, "run", interrupted)
    stacks = {"sincos": "positions:kind=sincos", "frozen": FROZEN}
    model = small_vit(embed_dim=192, num_heads=3)
    report = audit(model, labelled(photos[:2]), defenses=stacks, attacks=attack)
    assert report.interrupted and report.gate(max_gain=6) != 0
    assert not any(f.verdict == "resisted" for f in report.findings)
    assert report.findings[-1].reason == INTERRUPTED
    if attack.startswith("ladder"):  # it climbs no further
        cut = next(f for f in report.findings if "interrupted" in f.details)
        assert "span-robust" not in cut.details["rungs"]


def test_an_interrupt_between_attacks_loses_nothing(small_vit, photo, monkeypatch):
    calls: list[int] = []

    def stopped(self, *arguments, update=Guard.update, **how):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(self, *arguments, **how)

    monkeypatch.setattr(Guard, "update", stopped)
    stacks = {"frozen": FROZEN, "sincos": "positions:kind=sincos"}
    report = audit(small_vit(), labelled(photo), defenses=stacks, attacks=[PositionInversion()])
    assert report.interrupted and len(calls) == 2
    assert [f.verdict for f in report.findings] == ["leaks", "inconclusive", "inconclusive"]


@pytest.mark.slow
def test_an_interrupt_of_a_saved_updates_audit_loses_nothing(small_vit, photo, monkeypatch):
    model = small_vit()
    guard = protect(model, FROZEN)
    update = guard.update(Normalization().apply(photo), torch.tensor([0]))
    guard.remove()
    told = Told(photo, "interrupt")
    report = audit_update(model, update, defenses=FROZEN, attacks=[told, SpanInversion()])
    assert report.interrupted
    assert [f.reason for f in report.findings[2:]] == [INTERRUPTED, INTERRUPTED]
    calls: list[int] = []

    def counted(self, view, generator, run=Told.run):
        calls.append(1)
        return run(self, view, generator)

    monkeypatch.setattr(Told, "run", counted)
    report = audit_update(model, update, attacks=[replace(told, on_control=True)])
    assert report.interrupted and report.findings[-1].reason == INTERRUPTED
    assert len(calls) == 1, "the control was interrupted, the audit of the update went on"


@pytest.mark.parametrize(
    ("attacks", "stacks"),
    [
        (2, {"a": FROZEN}),
        (1, {"a b": FROZEN, "a-b": FROZEN}),
        (1, {"control": FROZEN}),
    ],
)
def test_files_that_two_runs_would_share_are_refused_before_the_first(
    small_vit, photo, tmp_path, attacks, stacks
):
    one = InvertingGradients(iterations=2, resume=str(tmp_path / "run.pt"))
    several = [one, replace(one, iterations=3)][:attacks]
    with pytest.raises(InputError, match="a resume file for each"):
        audit(small_vit(), labelled(photo), defenses=stacks, attacks=several)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_several_local_steps_do_not_end_the_ladder(small_vit, photo):
    report = audit(
        small_vit(), labelled(photo), attacks="ladder:seconds=10",
        training=LocalTraining(1e-3, 3),
    )  # fmt: skip
    assert report.findings[0].verdict == "leaks"


def test_an_attack_that_was_cut_short_was_not_resisted(small_vit, photo):
    report = audit(small_vit(), labelled(photo), defenses=FROZEN, attacks=[Told(photo)])
    assert report.findings[0].verdict == "leaks"
    assert report.findings[-1].verdict == "inconclusive"
    assert "ended before the end" in report.findings[-1].reason
    assert not report.interrupted and report.gate(max_gain=6) == 3


def test_any_error_of_an_attack_is_a_failed_attempt(small_vit, photo):
    report = audit(small_vit(), labelled(photo), defenses=FROZEN, attacks=[Told(photo, "index")])
    assert report.findings[-1].verdict == "inconclusive"
    assert report.findings[-1].reason == "the attack failed: IndexError: target -1"


@pytest.mark.slow
def test_each_configuration_and_batch_resumes_from_a_file_of_its_own(small_vit, photos, tmp_path):
    path = tmp_path / "run.pt"
    attack = InvertingGradients(iterations=3, resume=str(path))

    def once():
        return audit(
            small_vit(), labelled(photos[:2]), defenses=FROZEN, attacks=[attack], batch_size=1
        )

    first = once()
    names = {f"run-{run}-{b}.pt" for run in ("control", "positions-kind-frozen") for b in (0, 1)}
    assert {file.name for file in tmp_path.iterdir()} == names
    seen: list[int] = []
    attack = replace(attack, watch=lambda p: seen.append(p.iteration))
    again = once()
    assert not seen, "nothing was resumed"
    assert [f.psnr for f in again.findings] == [f.psnr for f in first.findings]
    gone = InvertingGradients(iterations=3, resume=str(tmp_path / "no" / "run.pt"))
    with pytest.raises(InputError, match="writable"):
        audit(small_vit(), labelled(photos[:1]), attacks=[PositionInversion(), gone])


def received(model, photo, attack, truth=None, **how):
    guard = protect(model, [])
    update = guard.update(Normalization().apply(photo), torch.tensor([0]))
    guard.remove()
    report = audit_update(
        model, update, attacks=[attack], truth=truth, normalization=Normalization(), **how
    )
    return report.findings[-1]


@pytest.mark.slow
def test_a_guess_that_explains_the_update_leaks_whatever_the_truth_is_said_to_be(small_vit, photos):
    other = received(small_vit(), photos[:1], PositionInversion(), truth=photos[1:2])
    assert other.verdict == "leaks" and other.psnr.max < 30
    assert "none of the images that were given" in other.reason
    right = received(small_vit(), photos[:1], PositionInversion(), truth=photos[:1])
    assert right.verdict == "leaks" and "none of the images" not in right.reason


def test_a_guess_that_was_fitted_to_the_update_does_not_explain_it(small_vit, photo):
    near = Guess(
        photo + 1e-4 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    )
    fitted = InvertingGradients(iterations=1, start=near)
    finding = received(small_vit(), photo, fitted)
    assert finding.details["update_error"] < 0.05
    assert finding.verdict == "inconclusive" and "fitted to the update" in finding.reason


@pytest.mark.slow
def test_the_last_layers_explain_no_image(small_vit, photo):
    @dataclass(frozen=True)
    class Labelled(Told):
        def run(self, view, generator):
            return Guess(self.image, torch.tensor([0]))

    model = small_vit()
    assert received(model, photo, Labelled(photo)).verdict == "leaks"
    early = ("patch", "position", "attention", "mlp", "cls_token")
    sealed = received(model, photo, Labelled(photo), withhold=early)
    assert sealed.verdict == "inconclusive"


def test_no_conclusive_attack_raises_without_limits_too(small_vit, photo):
    report = audit(small_vit(), labelled(photo), defenses=FROZEN, attacks=[PositionInversion()])
    assert report.findings[-1].verdict == "blocked"
    with pytest.raises(LeakFound, match="every attack was blocked"):
        report.raise_if_leaks()


@pytest.mark.slow
def test_a_target_epsilon_says_which_noise_was_audited(small_vit, photo):
    stack = "privacy:epsilon=8,epochs=3"
    report = audit(small_vit(), labelled(photo), defenses=stack, attacks=[PositionInversion()])
    (note,) = (note for note in report.notes if "epsilon=8" in note)
    assert "noise 1.04, enough for 3 updates" in note and "takes less noise" in note
    plain = audit(
        small_vit(), labelled(photo), defenses="privacy:noise=1", attacks=[PositionInversion()]
    )
    assert not any("noise" in note for note in plain.notes)
