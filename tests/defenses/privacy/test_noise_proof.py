"""The canary audit of Gaussian noise: near the claim, never above it, on numbers and the engine."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.fast import fast_for
from vitguard.defenses.noise import GradientNoise
from vitguard.defenses.privacy import ClientPrivacy, DifferentialPrivacy, Ledger
from vitguard.defenses.privacy.accounting import gaussian_epsilon, noise_for
from vitguard.defenses.privacy.canaries import canary_scores, prove_noise
from vitguard.draws import Draws
from vitguard.errors import InputError

pytest.importorskip("opacus")

DELTA = 1e-5
EIGHT = noise_for(8.0, DELTA, 1.0, 1)
"""Noise whose one release is epsilon 8."""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def simulated(noise, steps, canaries, rate, seed, shift=1.0):
    generator = seeded(seed)
    present = torch.rand(steps, canaries, generator=generator) < rate
    scores = noise * torch.randn(steps, canaries, generator=generator, dtype=torch.float64)
    return scores + shift * present, present


@pytest.mark.parametrize("seed", range(20))
def test_proved_epsilon_of_one_release_is_near_eight_and_never_above(seed):
    proof = prove_noise(*simulated(EIGHT, 20, 500, 0.5, seed), confidence=0.999)
    assert 6.5 < proof.epsilon(DELTA) <= 8.0


@pytest.mark.slow
def test_proved_epsilon_of_sampled_training_is_near_eight_and_never_above():
    noise, steps, rate = 1.2173, 60, 0.2  # epsilon 8
    proofs = [
        prove_noise(*simulated(noise, steps, 1000, rate, seed), sampled=True, confidence=0.999)
        for seed in range(20)
    ]
    assert all(p.rate < rate and p.mu < 1 / noise for p in proofs)  # epsilon grows with both
    least = min(proofs, key=lambda p: p.mu)
    assert 6.5 < least.epsilon(DELTA, steps) <= Ledger([(noise, rate, steps)]).spent(DELTA).epsilon


def test_the_bound_fails_no_more_often_than_its_confidence_says():
    proofs = [
        prove_noise(*simulated(1.0, 4, 100, 0.3, seed), sampled=True, confidence=0.8)
        for seed in range(400)
    ]
    assert sum(p.mu > 1.0 or p.rate > 0.3 for p in proofs) <= 0.2 * 400
    assert sum(p.mu > 0.6 for p in proofs) > 0.9 * 400  # and it is no wider than it must be by far


@pytest.mark.parametrize("defense", [DifferentialPrivacy(noise=EIGHT), ClientPrivacy(noise=EIGHT)])
@pytest.mark.parametrize("clip", [1e-3, 1.0, 50.0])
def test_canaries_in_the_code_that_clips_and_noises_come_near_the_claim(defense, clip):
    for seed in range(2):
        seen = canary_scores(replace(defense, clip=clip), Draws(seeded(seed)))
        proof = prove_noise(*seen, confidence=0.999)
        assert 6.5 < proof.epsilon(DELTA) <= 8.0


def test_seeds_of_the_draws_make_the_canaries_and_nothing_else_does():
    first, again = (canary_scores(DifferentialPrivacy(), Draws(seeded(1))) for _ in range(2))
    assert torch.equal(first.scores, again.scores) and torch.equal(first.present, again.present)
    other = canary_scores(DifferentialPrivacy(), Draws(seeded(2)))
    assert not torch.equal(first.scores, other.scores)


@pytest.mark.parametrize("kind", [DifferentialPrivacy, ClientPrivacy])
def test_noise_that_was_halved_or_a_clip_that_was_doubled_proves_more_than_is_claimed(
    kind, monkeypatch
):
    noised = Draws.noised
    with monkeypatch.context() as patched:
        patched.setattr(Draws, "noised", lambda self, t, d: noised(self, t, d / 2))
        proof = prove_noise(*canary_scores(kind(noise=EIGHT), Draws(seeded(0))), confidence=0.999)
    assert proof.epsilon(DELTA) > 8.0
    with monkeypatch.context() as patched:
        patched.setattr(Draws, "noised", lambda self, t, d: noised(self, 2 * t, d))
        proof = prove_noise(*canary_scores(kind(noise=EIGHT), Draws(seeded(0))), confidence=0.999)
    assert proof.epsilon(DELTA) > 8.0


def trained(seed, canaries=400, steps_per_epoch=5, epochs=10):
    """Train a linear head by the prepared loop; return what canaries prove, and what is claimed."""
    torch.manual_seed(seed)
    labels = torch.arange(canaries) % 2
    data = TensorDataset(8 * torch.eye(canaries), labels, torch.arange(canaries))
    head = nn.Linear(canaries, 2, bias=False)
    nn.init.zeros_(head.weight)
    defense = DifferentialPrivacy(noise=1.0, delta=DELTA)
    loader = DataLoader(data, canaries // steps_per_epoch)
    plain = torch.optim.SGD(head.parameters(), lr=0.0)
    optimizer, loader, ledger = defense.prepare(head, plain, loader, Draws(seeded(seed)))
    own = (0.5 - F.one_hot(labels, 2).float()).T * 2**0.5
    scores, present = [], []
    for _ in range(epochs):
        for inputs, targets, who in loader:
            optimizer.zero_grad()
            F.cross_entropy(head(inputs), targets).backward()
            optimizer.step()
            released = head.weight.grad.double() * loader.expected_batch_size
            scores.append((released * own).sum(0) / defense.clip)
            present.append(torch.isin(torch.arange(canaries), who))
    proof = prove_noise(torch.stack(scores), torch.stack(present), sampled=True, confidence=0.999)
    return proof, ledger.history


@pytest.mark.slow
@pytest.mark.parametrize("seed", fast_for(range(3), fast=[0]))
def test_canaries_in_training_on_the_prepared_loop_come_near_its_noise_and_rate_and_not_above(seed):
    proof, [(noise, rate, steps)] = trained(seed)
    assert (noise, rate, steps) == (1.0, 0.2, 50)
    assert 0.9 < proof.mu < 1 / noise and 0.9 * rate < proof.rate < rate
    if seed == 0:  # both make epsilon grow, so that one is enough
        claimed = Ledger([(noise, rate, steps)]).spent(DELTA).epsilon
        assert 0.8 * claimed < proof.epsilon(DELTA, steps) <= claimed


def test_noise_too_large_to_be_seen_proves_nothing():
    proof = prove_noise(*simulated(100.0, 10, 100, 0.5, 0))
    assert proof.mu == 0 and proof.epsilon(DELTA) == 0 and proof.power(0.01) == 0.01


def test_scores_without_noise_prove_an_infinite_epsilon():
    proof = prove_noise(*simulated(0.0, 10, 100, 0.5, 0))
    assert proof.epsilon(DELTA) == math.inf and proof.power(0.01) == 1.0


def test_several_releases_compose():
    proof = prove_noise(*simulated(2.0, 20, 500, 0.5, 0))
    assert proof.epsilon(DELTA, 4) == pytest.approx(gaussian_epsilon(2 * proof.mu, DELTA), rel=1e-6)


def test_what_the_audit_needs_is_said():
    scores, present = simulated(1.0, 4, 100, 0.5, 0)
    with pytest.raises(InputError, match="one shape"):
        prove_noise(scores, present[:2])
    with pytest.raises(InputError, match="one shape"):
        prove_noise(scores, present.float())
    with pytest.raises(InputError, match="at least 20"):
        prove_noise(scores, torch.zeros_like(present))
    with pytest.raises(InputError, match="canaries"):
        canary_scores(GradientNoise(0.1), Draws())
