"""Budgets count work: neither the clock nor the load of the machine moves a result."""

import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from vitguard.attacks.budget import ENDLESS, Budget, charge, worked
from vitguard.attacks.cascade import Cascade
from vitguard.attacks.gelu_span import GeluSpan
from vitguard.attacks.ladder import Ladder
from vitguard.attacks.robust import RobustPosition, RobustSpan
from vitguard.attacks.robust import attacks as robust
from vitguard.audit import LocalTraining, audit

FROZEN = "positions:kind=frozen"
NOISY = f"{FROZEN}+noise:scale=0.003"
STEPS = LocalTraining(0.01, 2)  # the difference of two steps, which `gelu-span` cannot read
CLOCKS = ("monotonic", "perf_counter", "process_time", "thread_time", "time")


def run(attack, view):
    return attack.run(view, torch.Generator().manual_seed(0))


def plain(report):
    """What a report says, without the seconds it took."""
    return [replace(f, seconds=None).to_json() for f in report.findings]


@pytest.mark.parametrize(
    ("defenses", "count", "seconds"),
    [
        pytest.param(FROZEN, 2, 0.4, id="a batch, cut", marks=pytest.mark.slow),
        pytest.param(NOISY, 1, 0.5, id="noise, cut", marks=pytest.mark.slow),  # by the same budget
        pytest.param(FROZEN, 1, 60.0, id="to the end"),
    ],
)
def test_a_clock_that_jumps_changes_no_guess(
    small_vit, observe, photos, monkeypatch, defenses, count, seconds
):
    view = observe(small_vit(), photos[:count], defenses=defenses)
    before = run(Ladder(seconds=seconds), view)
    now = [0.0]

    def jumping():
        now[0] += 1000.0
        return now[0]

    for clock in CLOCKS:
        monkeypatch.setattr(time, clock, jumping)
    after = run(Ladder(seconds=seconds), view)
    assert torch.equal(before.images, after.images)
    assert before.details == after.details


@pytest.mark.slow
def test_an_audit_beside_two_busy_processes_gives_the_same_decibels(small_vit, photos):
    how = {"defenses": NOISY, "attacks": "ladder:seconds=0.3"}
    batch = photos[:2], torch.arange(2)
    alone = audit(small_vit(), batch, **how)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        beside = audit(small_vit(), batch, **how)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert any(f.details.get("unfinished") for f in alone.findings)  # so the budget did cut
    assert plain(alone) == plain(beside)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack", [RobustPosition(seconds=1e-3), RobustSpan(seconds=1e-3), GeluSpan(seconds=1e-3)]
)
def test_a_rung_that_its_budget_cut_says_so(small_vit, observe, photos, attack):
    positions = "none" if isinstance(attack, RobustPosition) else FROZEN
    view = observe(small_vit(), photos[:2], defenses=f"{positions}+noise".removeprefix("none+"))
    guess = run(attack, view)
    assert any("budget" in what for what in guess.details["unfinished"])
    long = run(replace(attack, seconds=600.0), view)
    assert "unfinished" not in long.details


@pytest.mark.slow
def test_the_ladder_names_a_rung_that_found_nothing_before_its_budget_ended(
    small_vit, observe, photos, monkeypatch
):
    view = observe(small_vit(), photos[:2], defenses=FROZEN)
    noise = {k: torch.randn_like(t) for k, t in view.update.tensors.items()}
    view = replace(view, update=replace(view.update, tensors=noise))

    full = Cascade.run
    monkeypatch.setattr(Cascade, "run", lambda self, *how: full(replace(self, seconds=1e-3), *how))
    guess = run(Ladder(seconds=1.0), view)
    assert "cascade" in guess.details["unfinished"]
    assert "nominal seconds" in guess.details["rungs"]["cascade"]


@pytest.mark.slow
def test_a_cut_rung_never_makes_a_defense_resist(small_vit, photos, monkeypatch):
    """The last rung alone is cut: nothing else keeps the finding from `resisted`."""
    offer = robust.Choice.offer

    def hurried(self, candidates):
        if self.least == float("inf") and isinstance(candidates, type(_nothing())):
            self.budget = Budget.of(0)
        return offer(self, candidates)

    monkeypatch.setattr(robust.Choice, "offer", hurried)
    batch = photos[:1], torch.tensor([3])
    how = {"defenses": NOISY.replace("0.003", "0.3"), "training": STEPS}
    report = audit(small_vit(), batch, attacks="ladder:seconds=600", **how)
    (finding,) = (f for f in report.findings if f.defended)
    assert finding.control.verdict == "leaks"
    assert "span-robust" in finding.details["unfinished"]
    assert finding.verdict == "inconclusive" and "span-robust" in finding.reason
    monkeypatch.setattr(robust.Choice, "offer", offer)
    report = audit(small_vit(), batch, attacks="ladder:seconds=600", **how)
    (finding,) = (f for f in report.findings if f.defended)
    assert "unfinished" not in finding.details and finding.verdict != "inconclusive"


def _nothing():
    yield from ()


def test_a_budget_is_exact_wherever_the_count_stands():
    for start in (0.0, 1e12, 3.3e9):
        charge(products=start)
        budget = Budget.of(1.5)
        assert budget.left == 1.5 and not budget.over
        half = budget.part(0.5)
        assert half.left == 0.75
        charge(products=0.75 * 4e10)
        assert half.over and half.left == 0.0 and budget.left == 0.75
        charge(products=0.75 * 4e10)
        assert budget.over
    assert not ENDLESS.over and ENDLESS.part(0.5) == ENDLESS and Budget.of(float("inf")) == ENDLESS


def test_threads_do_not_spend_each_other_s_budgets():
    before = worked()
    thread = threading.Thread(target=lambda: charge(products=1e15))
    thread.start()
    thread.join()
    assert worked() == before


@pytest.mark.slow
def test_more_budget_is_never_less_work(small_vit, observe, photos):
    view = observe(small_vit(), photos[:1], defenses=NOISY)
    spent = []
    for seconds in (0.1, 0.4, 1.6):
        before = worked()
        run(RobustSpan(seconds=seconds), view)
        spent.append(1e-9 * (worked() - before))
    assert spent == sorted(spent)
    assert spent[0] < 1.0  # a step or two past its end
