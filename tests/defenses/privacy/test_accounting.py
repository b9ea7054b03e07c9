"""Epsilon against Google's dp-accounting, composition, calibration."""

import math

import pytest

from tests.fast import crossed
from vitguard.defenses.privacy import ClientPrivacy, Ledger
from vitguard.defenses.privacy.accounting import gaussian_delta, gaussian_epsilon, noise_for
from vitguard.errors import InputError

pytest.importorskip("opacus")

TABLE = [  # noise, rate, steps, delta
    (1.0, 0.01, 1000, 1e-5),
    (0.7, 0.01, 500, 1e-5),
    (1.1, 0.004, 3000, 1e-5),
    (2.0, 0.02, 2000, 1e-6),
    (4.0, 0.1, 200, 1e-5),
    (8.0, 0.01, 100, 1e-5),
    (0.6, 0.001, 2000, 1e-5),
    (1.5, 0.25, 50, 1e-4),
]


def by_loss_distribution(noise, rate, steps, delta):
    accounting = pytest.importorskip("dp_accounting")
    event = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise))
    accountant = accounting.pld.PLDAccountant(value_discretization_interval=1e-4)
    return accountant.compose(event, steps).get_epsilon(delta)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [*TABLE[:3], *(pytest.param(*case, marks=pytest.mark.slow) for case in TABLE[3:])],
)
def test_epsilon_is_within_two_percent_of_the_privacy_loss_distribution(noise, rate, steps, delta):
    ledger = Ledger()
    ledger.record(noise, rate, steps)
    reference = by_loss_distribution(noise, rate, steps, delta)
    assert ledger.spent(delta).epsilon == pytest.approx(reference, rel=0.02)
    assert ledger.spent(delta, "rdp").epsilon >= reference * 0.999


def test_ten_rounds_spend_what_one_run_of_the_same_steps_spends():
    whole, rounds = Ledger(), Ledger()
    whole.record(1.0, 0.02, 100)
    for _ in range(10):
        fresh = Ledger()
        fresh.load_state_dict(rounds.state_dict())
        for _ in range(10):
            fresh.record(1.0, 0.02)
        rounds = fresh
    assert rounds.history == whole.history
    assert rounds.spent(1e-5) == whole.spent(1e-5)


def test_rounds_of_different_noise_compose_above_each_and_below_their_sum():
    mixed, first, second = Ledger(), Ledger(), Ledger()
    for ledger in (mixed, first):
        ledger.record(1.0, 0.02, 100)
    for ledger in (mixed, second):
        ledger.record(2.0, 0.05, 100)
    mixed.record(1.0, 0.02, 0)
    parts = [ledger.spent(1e-5).epsilon for ledger in (first, second)]
    assert max(parts) < mixed.spent(1e-5).epsilon < sum(parts)


def test_gaussian_epsilon_is_exact():
    # mu = 1: delta(1) = Phi(-1/2) - e Phi(-3/2)
    assert gaussian_delta(1.0, 1.0) == pytest.approx(0.126936, abs=1e-5)
    for mu in (0.1, 1.0, 5.0):
        assert gaussian_delta(mu, gaussian_epsilon(mu, 1e-5)) == pytest.approx(1e-5, rel=1e-6)
    ledger = Ledger()
    ledger.record(2.0, 1.0, 4)
    assert ledger.spent(1e-5).epsilon == pytest.approx(gaussian_epsilon(1.0, 1e-5))


def test_releases_without_noise_have_infinite_epsilon_and_no_release_has_zero():
    ledger = Ledger()
    assert ledger.spent(1e-5).epsilon == 0
    ledger.record(0.0, 0.1)
    assert ledger.spent(1e-5).epsilon == math.inf


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"),
    [(1.0, 0.02, 30), pytest.param(8.0, 0.05, 100, marks=pytest.mark.slow)],
)
def test_noise_for_a_target_spends_it_and_no_more(epsilon, rate, steps):
    ledger = Ledger()
    ledger.record(noise_for(epsilon, 1e-5, rate, steps), rate, steps)
    assert 0.98 * epsilon < ledger.spent(1e-5).epsilon <= epsilon


@pytest.mark.parametrize(
    "state",
    [{}, {"version": 2, "history": []}, {"version": 1, "history": [["a", 1, 1]]}, [],
     {"version": 1, "history": [[1.0, 2.0, 1]]}],
)  # fmt: skip
def test_broken_states_are_refused_and_change_nothing(state):
    ledger = Ledger()
    ledger.record(1.0, 0.5, 3)
    with pytest.raises(InputError):
        ledger.load_state_dict(state)
    assert ledger.steps == 3


def test_client_privacy_composes_over_rounds():
    defense = ClientPrivacy(epsilon=4.0, rounds=10)
    assert defense.spent().epsilon == pytest.approx(4.0, rel=0.01)
    assert defense.spent().epsilon <= 4.0
    assert defense.spent(1).epsilon < defense.spent(5).epsilon < 4.0


@pytest.mark.parametrize("mu", [1e-2, 0.5, 3.7, 50.0, 1000.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.1])
def test_gaussian_epsilon_is_an_upper_bound_and_the_least_one(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    assert gaussian_delta(mu, epsilon) <= delta
    assert epsilon == 0 or gaussian_delta(mu, epsilon * (1 - 1e-9)) > delta


@pytest.mark.parametrize(("rate", "epsilon"), crossed([0.05, 1.0], [0.3, 3.0, 41.0, 900.0]))
def test_a_thousandth_less_noise_than_noise_for_spends_more(epsilon, rate):
    noise = noise_for(epsilon, 1e-5, rate, 10, "rdp")
    spent = []
    for factor in (1.0, 0.9989):
        ledger = Ledger()
        ledger.record(noise * factor, rate, 10)
        spent.append(ledger.spent(1e-5, "rdp").epsilon)
    assert spent[0] <= epsilon and (spent[1] > epsilon or noise == 0.05)


def test_noise_for_asks_for_no_less_than_accountants_were_made_for():
    assert noise_for(1e6, 1e-5, 0.01, 10, "rdp") == 0.05
