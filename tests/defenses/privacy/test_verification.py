"""The verification must pass what is right and catch what is broken."""

import math

import pytest
import torch
from scipy.stats import norm

from vitguard.defenses.privacy import (
    Ledger,
    audit_epsilon,
    measure_noise,
    measure_sensitivity,
    one_run_audit,
    reconstruction_bound,
)
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


def test_audit_catches_a_clip_that_does_not_clip():
    noise = 4.5
    generator = torch.Generator().manual_seed(0)
    bound = one_run_audit(mechanism(noise, actual_clip=1e6), generator=generator)
    assert bound.epsilon > 3 > claim(noise)


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
