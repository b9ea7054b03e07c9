"""The trade-off curve against Monte Carlo, dp-accounting, closed forms and the best attacks."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from vitguard.defenses.privacy import membership_bound, reconstruction_bound
from vitguard.defenses.privacy import trade_off as module
from vitguard.defenses.privacy.trade_off import gaussian_power, power_of
from vitguard.errors import InputError

pytest.importorskip("opacus")

SAMPLED = [  # noise, steps, rate
    (1.0, 20, 0.1),
    pytest.param(0.7, 30, 0.05, marks=pytest.mark.slow),
    pytest.param(2.0, 200, 0.1, marks=pytest.mark.slow),
]


def losses(noise, steps, rate, present, trials, generator):
    """Return log-likelihood ratios of whole runs: what the best test for one record looks at."""
    total = np.zeros(trials)
    for _ in range(steps):
        joined = (generator.random(trials) < rate) & present
        seen = joined + noise * generator.standard_normal(trials)
        total += np.log1p(rate * np.expm1((2 * seen - 1) / (2 * noise**2)))
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "steps", "rate"), SAMPLED)
def test_power_of_sampled_releases_is_that_of_the_best_test_and_not_below(noise, steps, rate):
    generator, trials = np.random.default_rng(0), 40_000
    without, within = (
        losses(noise, steps, rate, present, trials, generator) for present in (False, True)
    )
    power = power_of([(noise, rate, steps)])
    for level in (0.01, 0.1):
        reached = (within > np.quantile(without, 1 - level)).mean()
        # the quantile is of 400 runs at least: 5 % of the level, three times
        assert reached * 0.85 <= power(level) <= reached * 1.15 + 0.002


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "steps", "rate"), SAMPLED)
def test_power_agrees_with_the_privacy_loss_distribution_of_dp_accounting(noise, steps, rate):
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    whole = pld.from_gaussian_mechanism(noise, sampling_prob=rate, use_connect_dots=True)
    composed = whole.self_compose(steps)
    epsilons = np.linspace(0, 12, 600)
    deltas = np.array(composed.get_delta_for_epsilon(epsilons))
    power = power_of([(noise, rate, steps)])
    for level in (0.001, 0.01, 0.1):
        reference = min(1.0, float((np.exp(epsilons) * level + deltas).min()))
        assert power(level) == pytest.approx(reference, rel=0.01)


@pytest.mark.parametrize("level", [1e-6, 0.01, 0.3, 0.99])
@pytest.mark.parametrize(("noise", "steps"), [(0.5, 1), (1.1, 1), (2.0, 9), (30.0, 1000)])
def test_without_sampling_the_bound_is_the_gaussian_closed_form(level, noise, steps):
    expected = norm.cdf(norm.ppf(level) + math.sqrt(steps) / noise)
    assert reconstruction_bound(level, noise, steps) == pytest.approx(expected, rel=1e-9)
    assert membership_bound(level, noise, steps) == pytest.approx(expected, rel=1e-9)


def test_sampling_at_a_rate_near_one_comes_near_the_closed_form():
    sampled = reconstruction_bound(0.01, 2.0, 5, rate=1 - 1e-9)
    assert sampled == pytest.approx(gaussian_power(0.01, math.sqrt(5) / 2), rel=0.01)


def test_which_of_two_opposite_records_it_was_is_told_as_often_as_the_bound_says():
    """Reconstruction asks which record it was; one added or removed is what bounds it, tightly."""
    noise, trials = 1.3, 200_000
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 2, trials) * 2 - 1  # gradients of +clip and -clip
    seen = truth + noise * generator.standard_normal(trials)
    success = (np.sign(seen) == truth).mean()
    assert success == pytest.approx(reconstruction_bound(0.5, noise, 1), abs=0.004)


@pytest.mark.slow
def test_the_bound_holds_for_the_best_attack_on_many_candidates_and_sampled_steps():
    """Simplex of candidates: the best guess is the likeliest one, over all steps."""
    noise, steps, rate, trials, candidates = 0.8, 10, 0.3, 4000, 10
    generator = np.random.default_rng(0)
    truth = generator.integers(0, candidates, trials)
    total = np.zeros((trials, candidates))
    for _ in range(steps):
        joined = generator.random(trials) < rate
        seen = noise * generator.standard_normal((trials, candidates))
        seen[np.arange(trials), truth] += joined
        total += np.log1p(rate * np.expm1((2 * seen - 1) / (2 * noise**2)))
    success = (total.argmax(1) == truth).mean()
    bound = reconstruction_bound(1 / candidates, noise, steps, rate)
    assert 2 / candidates < success <= bound


def test_a_replaced_record_moves_the_sum_by_two_clips():
    noise, steps = 2.0, 4
    replaced = membership_bound(0.01, noise, steps, neighbours="replaced")
    assert replaced == pytest.approx(gaussian_power(0.01, 2 * math.sqrt(steps) / noise), rel=1e-6)
    assert replaced > 3 * membership_bound(0.01, noise, steps)


@pytest.mark.slow
def test_a_sampled_record_that_is_replaced_is_told_by_no_test_better_than_the_bound():
    noise, steps, rate, level, trials = 1.0, 20, 0.1, 0.05, 40_000
    generator = np.random.default_rng(0)

    def ratios(sign):
        total = np.zeros(trials)
        for _ in range(steps):
            joined = generator.random(trials) < rate
            seen = sign * joined + noise * generator.standard_normal(trials)
            up, down = (
                np.log1p(rate * np.expm1((2 * s * seen - 1) / (2 * noise**2))) for s in (1, -1)
            )
            total += up - down
        return total

    reached = (ratios(1) > np.quantile(ratios(-1), 1 - level)).mean()
    bound = membership_bound(level, noise, steps, rate, neighbours="replaced")
    assert membership_bound(level, noise, steps, rate) < reached <= bound < 2 * reached


@pytest.mark.slow
@pytest.mark.parametrize(
    "history", [[(1.0, 0.1, 10), (0.8, 0.05, 20)], [(1.0, 0.1, 5), (3.0, 1.0, 2)]]
)
def test_entries_of_several_kinds_compose_and_never_below_any_part(history):
    whole = power_of(history)(0.01)
    parts = [power_of([entry])(0.01) for entry in history]
    assert max(parts) <= whole * 1.001
    assert whole <= power_of(history[1:])(parts[0]) * 1.01  # trade-offs compose no better


@pytest.mark.slow
def test_power_grows_with_level_and_steps_and_never_falls_below_the_level():
    power = power_of([(1.0, 0.02, 50)])
    levels = [0.0, 1e-9, 1e-4, 0.01, 0.3, 0.9, 0.9999, 1.0]
    reached = [power(level) for level in levels]
    assert reached == sorted(reached)
    assert reached[0] == 0 and reached[-1] == 1
    assert all(b >= a for a, b in zip(levels, reached, strict=True))
    assert power_of([(1.0, 0.02, 500)])(0.01) > power(0.01)


@pytest.mark.slow
def test_where_no_mesh_fits_a_coarser_upper_bound_takes_its_place(monkeypatch):
    fine = reconstruction_bound(0.01, 2.0, 5, 0.1)
    monkeypatch.setattr(module, "_MOST_POINTS", 100)
    coarse = reconstruction_bound(0.01, 2.0, 5, 0.1)
    assert fine <= coarse < 4 * fine
    assert reconstruction_bound(0.01, 0.02, 20, 0.1) == 1.0  # noise beyond any mesh


def test_no_noise_gives_no_bound_and_no_step_tells_nothing():
    assert reconstruction_bound(0.01, 0.0, 1) == 1
    assert reconstruction_bound(0.01, 0.0, 1, rate=0.1) == 1
    assert reconstruction_bound(0.01, 1.0, 0) == 0.01
    assert membership_bound(0.0, 1.0, 5) == 0


@pytest.mark.parametrize(
    "arguments", [(-0.1, 1.0, 1), (1.1, 1.0, 1), (0.1, -1.0, 1), (0.1, 1.0, -1), (0.1, 1.0, 1, 0.0)]
)
def test_values_out_of_range_are_refused(arguments):
    for bound in (reconstruction_bound, membership_bound):
        with pytest.raises(InputError):
            bound(*arguments)
    with pytest.raises(InputError):
        membership_bound(0.1, 1.0, 1, neighbours="swapped")
