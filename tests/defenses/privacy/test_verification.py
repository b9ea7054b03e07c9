"""The verification must pass what is right and catch what is broken."""

import itertools
import math

import pytest
import torch
from scipy.stats import norm

from vitguard.defenses.privacy import (
    Ledger,
    audit_epsilon,
    canary_audit,
    canary_bound,
    measure_noise,
    measure_sensitivity,
    one_run_audit,
    reconstruction_bound,
)
from vitguard.defenses.privacy.accounting import noise_for
from vitguard.defenses.privacy.engine import clipped_sum
from vitguard.defenses.privacy.tape import Tape
from vitguard.errors import InputError


def clipped(gradients, clip=1.0):
    """The engine's own clipping, on gradients that are given."""
    parameter = torch.nn.Parameter(torch.zeros(gradients.shape[1]))
    tape = Tape({"p": parameter}, len(gradients))
    from vitguard.defenses.privacy.tape import Samples

    tape.enter(parameter, "canary").uses.append(Samples(gradients))
    return clipped_sum(tape, clip).sums["p"]


def mechanism(noise, clip=1.0, actual_clip=1.0, seed=0):
    def release(gradients):
        generator = torch.Generator().manual_seed(1000 + seed)  # never the canaries' own draws
        total = clipped(gradients, actual_clip)
        return total + noise * clip * torch.randn(total.shape, generator=generator)

    return release


def claim(noise, delta=1e-5):
    ledger = Ledger()
    ledger.record(noise, 1.0, 1)
    return ledger.spent(delta).epsilon


@pytest.mark.parametrize("seed", range(5))
def test_lower_bound_of_the_audit_does_not_exceed_the_claim(seed):
    noise = 4.5
    generator = torch.Generator().manual_seed(seed)
    bound = one_run_audit(mechanism(noise, seed=seed), generator=generator)
    assert claim(noise) <= 1.0
    assert bound.epsilon <= claim(noise)


@pytest.mark.slow
def test_audit_catches_a_clip_that_does_not_clip():
    noise = 4.5
    generator = torch.Generator().manual_seed(0)
    bound = one_run_audit(mechanism(noise, actual_clip=1e6), generator=generator)
    assert bound.epsilon > 3 > claim(noise)


@pytest.mark.slow
def test_audit_bound_of_perfect_guesses_saturates_where_it_should():
    assert audit_epsilon(80, 80, 400, 1e-5).epsilon == pytest.approx(3.27, abs=0.02)
    assert audit_epsilon(80, 40, 400, 1e-5).epsilon == 0


def test_sensitivity_of_a_clipped_sum_is_the_clip_and_of_a_plain_one_is_not():
    torch.manual_seed(0)
    gradients = 5 * torch.randn(6, 20)
    assert measure_sensitivity(lambda rows: clipped(gradients[rows]), 6) == pytest.approx(1.0)
    assert measure_sensitivity(lambda rows: gradients[rows].sum(0), 6) > 10


def test_noise_test_accepts_the_claim_and_rejects_others():
    generator = torch.Generator().manual_seed(0)
    noise = 0.5 * torch.randn(20_000, generator=generator)
    assert measure_noise(noise, 0.5).p_value > 0.01
    assert measure_noise(noise, 0.5).ratio == pytest.approx(1, abs=0.02)
    assert measure_noise(noise, 0.53).p_value < 1e-6
    uniform = (torch.rand(20_000, generator=generator) - 0.5) * 0.5 * math.sqrt(12)
    assert measure_noise(uniform, 0.5).p_value < 1e-6
    with pytest.raises(InputError):
        measure_noise(noise[:10], 0.5)


def test_reconstruction_bound_is_the_gaussian_trade_off():
    assert reconstruction_bound(0.1, 2.0, 4) == pytest.approx(norm.cdf(norm.ppf(0.1) + 1))
    assert reconstruction_bound(0.1, 0.0, 1) == 1
    assert reconstruction_bound(0.1, 1.0, 0) == 0.1


def test_reconstruction_bound_holds_for_the_best_attack():
    # one of ten known records was used: the best guess is the largest score
    torch.manual_seed(0)
    trials, records, noise = 4000, 10, 2.0
    truth = torch.randint(0, records, (trials,))
    seen = torch.nn.functional.one_hot(truth, records) + noise * torch.randn(trials, records)
    success = (seen.argmax(1) == truth).float().mean().item()
    assert 0.1 < success <= reconstruction_bound(1 / records, noise, 1) + 0.02


def test_sampling_makes_the_reconstruction_bound_smaller():
    pytest.importorskip("opacus")
    whole = reconstruction_bound(0.01, 1.0, 20)
    assert 0.01 < reconstruction_bound(0.01, 1.0, 20, rate=0.01) < whole


# --- canaries in Gaussian form


def scores(count, noise, shift=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    absent, present = noise * torch.randn(2, count, generator=generator, dtype=torch.float64)
    return absent, present + shift


@pytest.mark.parametrize("epsilon", [1.0, 3.0, 8.0])
def test_canary_bound_of_a_sound_mechanism_comes_near_the_claim_and_not_above(epsilon):
    noise = noise_for(epsilon, 1e-5, 1.0, 1)
    bound = canary_bound(*scores(5000, noise), 1e-5, confidence=0.99)
    assert 0.6 * epsilon < bound.gaussian <= claim(noise)
    assert 0 < bound.thresholds <= claim(noise)


@pytest.mark.slow
def test_canary_bound_fails_no_more_often_than_its_confidence_says():
    noise, runs = noise_for(8.0, 1e-5, 1.0, 1), 400
    bounds = [canary_bound(*scores(200, noise, seed=i), 1e-5, confidence=0.8) for i in range(runs)]
    above = sum(b.epsilon > claim(noise) for b in bounds)
    assert above <= 0.2 * runs  # it may fail in a fifth of the runs
    # the margin is no wider than it must be by far
    assert sum(b.mu > 0.75 / noise for b in bounds) > 0.9 * runs


@pytest.mark.slow
def test_canary_bound_by_thresholds_holds_for_scores_that_are_not_normal():
    laplace = torch.distributions.Laplace(0.0, 1.0)  # sensitivity 1: epsilon 1, delta 0
    torch.manual_seed(0)
    bounds = [
        canary_bound(laplace.sample((2000,)), 1 + laplace.sample((2000,)), 1e-9) for _ in range(40)
    ]
    assert max(b.thresholds for b in bounds) <= 1.0
    assert min(b.thresholds for b in bounds) > 0.5


def test_canary_bound_of_equal_scores_is_nothing_and_of_separate_ones_saturates_or_is_infinite():
    same = torch.zeros(100)
    assert canary_bound(same, same, 1e-5).epsilon == 0
    apart = canary_bound(same, same + 1, 1e-5)
    assert apart.gaussian == math.inf
    assert 1 < apart.thresholds < math.log(100)


@pytest.mark.parametrize(
    "fault", ["none", "noise halved", "clip doubled", "noise reused", "noise twice"]
)
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_canary_audit_finds_each_fault_of_a_mechanism(epsilon, fault):
    noise = noise_for(epsilon, 1e-5, 1.0, 1)
    generator = torch.Generator().manual_seed(0)
    deviation = noise / 2 if fault == "noise halved" else noise
    shift = 2.0 if fault == "clip doubled" else 1.0
    calls = itertools.count()

    def release(included):
        call = next(calls)
        if fault in ("noise reused", "noise twice"):  # always the same, or fresh every second time
            generator.manual_seed(call // 2 if fault == "noise twice" else 1)
        return shift * included + deviation * float(torch.randn((), generator=generator))

    bound = canary_audit(release, trials=2000, confidence=0.99)
    assert (bound.epsilon > claim(noise)) == (fault != "none")


def test_canary_bound_says_what_it_needs():
    few = torch.zeros(10)
    with pytest.raises(InputError):
        canary_bound(few, few, 1e-5)
    with pytest.raises(InputError):
        canary_bound(torch.zeros(30), torch.zeros(30), 1.5)
