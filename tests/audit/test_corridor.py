"""The corridor of a private stack: its bound, what attacks reached, what canaries prove."""

import io
import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from scipy.stats import norm

from tests.defenses.privacy.privacy_models import build
from tests.defenses.privacy.test_bound import STACKS, Grey, finding_of, report
from vitguard.audit import audit_update
from vitguard.audit.corridor import corridor_of
from vitguard.core import Normalization
from vitguard.defenses.privacy import ClientPrivacy, DifferentialPrivacy
from vitguard.draws import Draws
from vitguard.guard import protect
from vitguard.report.corridor import Corridor
from vitguard.report.finding import Finding
from vitguard.report.words import corridor_lines, share

HALF = Normalization((0.5,) * 3, (0.5,) * 3)


@dataclass(frozen=True)
class Unstated(DifferentialPrivacy):
    """A private defense of a third party that does not say how it noises."""

    name: ClassVar[str] = "unstated"

    def one_update(self, steps):
        return None


def images():
    torch.manual_seed(0)
    return torch.rand(2, 3, 32, 32), torch.tensor([0, 1])


def trade_off(mu, prior=0.01):
    return norm.cdf(norm.ppf(prior) + mu)


@pytest.mark.slow
def test_bound_of_a_corridor_is_the_trade_off_of_one_update_and_the_proof_lies_below_it():
    of = finding_of("records").corridor
    assert of.bound == pytest.approx(trade_off(1 / 1.1))
    assert 0.7 * of.bound < of.proved_rate <= of.bound
    assert 0.7 * of.epsilon < of.proved <= of.epsilon
    assert of.prior == 0.01 and not of.broken


@pytest.mark.slow
def test_every_local_step_counts_for_the_corridor_of_records_and_the_whole_for_a_client():
    training = {"learning_rate": 0.1, "steps": 3}
    assert finding_of("records", **training).corridor.bound == pytest.approx(
        trade_off(math.sqrt(3) / 1.1)
    )
    assert finding_of("client", **training).corridor.bound == pytest.approx(trade_off(1 / 2))


@pytest.mark.slow
def test_of_two_guarantees_the_corridor_is_that_of_the_stronger_one():
    of = finding_of("both").corridor
    assert of.defense == "client-privacy:noise=4.0"
    assert of.bound == pytest.approx(trade_off(1 / 4))


@pytest.mark.parametrize("stack", [pytest.param("baseline", marks=pytest.mark.slow), "none"])
def test_a_stack_without_differential_privacy_has_no_corridor(stack):
    assert finding_of(stack).corridor is None
    assert finding_of(stack).to_json()["corridor"] is None
    assert corridor_lines([finding_of(stack)]) == []


def test_without_noise_the_corridor_says_that_there_is_bound_note_and_why():
    of = finding_of("no noise").corridor
    assert of.bound is None and of.proved is None and of.epsilon is None
    said = dict(corridor_lines([finding_of("no noise")]))
    assert "no noise" in said["Bound"] and "no noise" in said["Proved"]


def test_a_defense_that_does_not_state_its_noise_says_why_there_is_no_corridor():
    of = corridor_of([Unstated()], 1, 0)
    assert of.bound is None and "does not state its noise" in of.bound_note


def test_a_mechanism_without_canaries_has_a_bound_and_says_why_nothing_is_proved(monkeypatch):
    from vitguard.audit import corridor
    from vitguard.errors import expected

    def refused(defense, draws):
        raise expected("a defense that canaries are known for", defense.name)

    monkeypatch.setattr(corridor, "canary_scores", refused)
    of = corridor_of([DifferentialPrivacy(noise=1.7)], 1, 0)
    assert of.bound is not None and of.proved is None and "canaries" in of.proof_note


def test_steps_that_nobody_knows_leave_bound_note_for_records_but_one_for_a_client():
    assert "not known" in corridor_of([DifferentialPrivacy()], None, 0).bound_note
    assert corridor_of([ClientPrivacy(noise=2.0)], None, 0).bound == pytest.approx(trade_off(0.5))


def test_the_same_seed_gives_the_same_corridor_and_another_seed_another_proof():
    stack = [DifferentialPrivacy(noise=0.9)]
    assert corridor_of(stack, 1, 0) == corridor_of(stack, 1, 0)
    assert corridor_of(stack, 1, 0).proved != corridor_of(stack, 1, 1).proved


def test_noise_that_is_less_than_claimed_shows_as_a_broken_mechanism_in_words(monkeypatch):
    noised = Draws.noised
    monkeypatch.setattr(Draws, "noised", lambda self, t, d: noised(self, t, d / 2))
    of = corridor_of([DifferentialPrivacy(noise=0.77)], 1, 0)
    assert of.broken
    said = dict(corridor_lines([replace(finding_of("records"), corridor=of)]))
    assert "do not rely on the bound" in said["Proved"]


@pytest.mark.slow
def test_an_update_that_was_received_has_the_corridor_of_the_stack_that_is_stated_for_it():
    model = build("vit", torch.float32)
    guard = protect(model, STACKS["records"])
    pixels, labels = images()
    update = guard.update(HALF.apply(pixels), labels)
    made = audit_update(
        build("vit", torch.float32), update, defenses=STACKS["records"], attacks=[Grey()],
        normalization=HALF, truth=pixels,
    )  # fmt: skip
    of = next(f.corridor for f in made.findings if f.defended)
    assert of.bound == pytest.approx(trade_off(1 / 1.1))


def test_every_form_of_the_report_says_the_corridor_in_words():
    made, of = report(), finding_of("records").corridor
    limit = math.ceil(1000 * of.bound) / 10
    wanted = [
        "an adversary who would guess the image with probability 1 % guesses it with at most "
        f"{limit:g} % from this update",
        "the best attack of this audit identified 0 % of the images",
        "observations of canaries",
    ]
    console = Console(file=io.StringIO(), width=80)
    made.print_to(console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for form in (text, made.to_markdown(), made.to_html()):
        flat = " ".join(form.replace("&nbsp;", " ").split())
        assert all(words in flat for words in wanted)
    entry = next(
        f for f in json.loads(made.to_json_text())["findings"] if f["defense"] == "records"
    )
    assert entry["corridor"]["bound"] == of.bound
    assert entry["corridor"]["reached"] == entry["identified"] == 0
    assert entry["details"]["reconstruction_prior"] == 0.05  # the names of before stay


def test_rounding_never_makes_a_bound_smaller_or_a_proof_larger():
    of = Corridor(
        "privacy", delta=1e-5, bound=0.12301, epsilon=2.0, proved=1.2399, proved_rate=0.05999,
        observations=100, confidence=0.999,
    )  # fmt: skip
    finding = Finding("privacy", "grey", "resisted", corridor=of)
    said = dict(corridor_lines([finding]))
    assert "at most 12.4 %" in said["Bound"]
    assert "at least 1.23 " in said["Proved"] and "at least 5.9 %" in said["Proved"]
    nothing = replace(finding, corridor=replace(of, bound=0.9999))
    assert "bounds nothing" in dict(corridor_lines([nothing]))["Bound"]


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.9997, "over 99.9 %"), (0.9952, "99.5 %"), (1.0, "100 %"), (2e-5, "0.002 %"), (0.0, "0 %")],
)
def test_a_share_just_below_one_is_not_written_as_all(value, written):
    assert share(value) == written
