"""Checking a privacy claim from outside: sensitivity, noise, a lower bound, reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitguard.errors import expected

__all__ = [
    "AuditBound",
    "NoiseFit",
    "audit_epsilon",
    "measure_noise",
    "measure_sensitivity",
    "one_run_audit",
    "reconstruction_bound",
]

Total = Callable[[Sequence[int]], Tensor]


def measure_sensitivity(total: Total, count: int) -> float:
    """Return how far the sum moves at most when one of `count` examples leaves.

    Args:
        total: Returns the flat clipped sum of the examples with the given indices. Every random
            draw (mask, dropout, drop path) must follow the example's index: otherwise this
            measures how the generator shifts.
    """
    everyone = range(count)
    whole = total(list(everyone)).double()
    moved = [
        float((whole - total([j for j in everyone if j != i]).double()).norm()) for i in everyone
    ]
    return max(moved)


@dataclass(frozen=True)
class NoiseFit:
    """Noise as measured: its deviation over the claimed one, and a p-value against the claim."""

    ratio: float
    p_value: float


def measure_noise(samples: Tensor, deviation: float) -> NoiseFit:
    """Compare noise with N(0, deviation^2) by a two-sided test of its variance and its shape.

    Args:
        samples: Releases minus the clipped sum, any shape; at least 100 values.
        deviation: The claim, `noise * clip`, above 0.
    """
    from scipy.stats import chi2, kstest

    values = samples.detach().double().flatten()
    if len(values) < 100 or not deviation > 0:
        raise expected("at least 100 values and a deviation above 0", f"{len(values)}, {deviation}")
    scaled = values / deviation
    total, n = float(scaled.square().sum()), len(values)
    variance = 2 * min(float(chi2.cdf(total, n)), float(chi2.sf(total, n)))
    shape = float(kstest(scaled.numpy(), "norm").pvalue)
    return NoiseFit(math.sqrt(total / n), min(1.0, 2 * min(variance, shape)))


@dataclass(frozen=True)
class AuditBound:
    """What guesses prove: epsilon is at least `epsilon` with the given confidence."""

    epsilon: float
    guesses: int
    correct: int
    confidence: float


def audit_epsilon(
    guesses: int, correct: int, canaries: int, delta: float, confidence: float = 0.95
) -> AuditBound:
    """Return the lower bound on epsilon that `correct` of `guesses` memberships prove.

    Reference: Steinke, Nasr and Jagielski, arXiv:2305.08846, theorem 5.2.
    """
    if not 0 <= correct <= guesses <= canaries or not 0 < confidence < 1:
        raise expected(
            "correct <= guesses <= canaries and a confidence in (0, 1)",
            f"{correct}, {guesses}, {canaries}, {confidence}",
        )
    low, high = 0.0, 30.0
    if _chance(0.0, guesses, correct, canaries, delta) > 1 - confidence:
        return AuditBound(0.0, guesses, correct, confidence)
    for _ in range(60):
        middle = (low + high) / 2
        proved = _chance(middle, guesses, correct, canaries, delta) < 1 - confidence
        low, high = (middle, high) if proved else (low, middle)
    return AuditBound(low, guesses, correct, confidence)


def _chance(epsilon: float, guesses: int, correct: int, canaries: int, delta: float) -> float:
    """Return the most likely that so many are right under (epsilon, delta)."""
    from scipy.stats import binom

    right = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, right))
    worst = 0.0
    for i in range(1, correct + 1):
        mass = float(binom.sf(correct - i - 1, guesses, right)) - beta
        worst = max(worst, mass / i)
    return min(1.0, beta + 2 * canaries * delta * worst)


def one_run_audit(
    release: Callable[[Tensor], Tensor],
    *,
    canaries: int = 400,
    guesses: int = 80,
    dimension: int = 2000,
    size: float = 1e3,
    delta: float = 1e-5,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> AuditBound:
    """Audit one run of a mechanism with gradient canaries, each in at random.

    Canary i is a gradient of norm `size` along its own direction. The mechanism gets the gradients
    of those that are in, shape (included, dimension), and returns its private sum, shape
    (dimension,). The surest guesses (largest and smallest scores) are counted. The bound must not
    exceed what the mechanism claims; a clip that does not clip exceeds it.

    It saturates (at about 3.3 with 80 guesses): audit mechanisms that claim epsilon <= 1.

    Reference: Steinke, Nasr and Jagielski, arXiv:2305.08846.
    """
    if not 2 <= guesses <= canaries <= dimension:
        raise expected("guesses <= canaries <= dimension", f"{guesses}, {canaries}, {dimension}")
    included = torch.rand(canaries, generator=generator) < 0.5
    gradients = torch.zeros(canaries, dimension)
    gradients[torch.arange(canaries), torch.arange(canaries)] = size
    scores = release(gradients[included])[:canaries]
    order = scores.argsort()
    half = guesses // 2
    correct = int(included[order[-half:]].sum()) + int((~included[order[:half]]).sum())
    return audit_epsilon(2 * half, correct, canaries, delta, confidence)


def reconstruction_bound(prior: float, noise: float, steps: int, rate: float = 1.0) -> float:
    """Return the most any attack can succeed in reconstructing one record.

    Success is at most Phi(Phi^-1(prior) + sqrt(steps) / noise) for the Gaussian mechanism that adds
    or removes a record; with Poisson sampling at `rate` the trade-off function of the composed
    mechanism takes its place, from above, through dominating pairs of the privacy loss.

    Args:
        prior: Chance in [0, 1] that a guess succeeds without seeing anything.
        noise: Noise multiplier; 0 gives 1, no bound.
        steps: Releases.
        rate: Poisson sampling rate in (0, 1].

    References:
        Balle, Cherubin and Hayes, arXiv:2201.04845; Hayes et al., arXiv:2302.07225.
    """
    from scipy.stats import norm

    if not 0 <= prior <= 1 or not noise >= 0 or steps < 0 or not 0 < rate <= 1:
        raise expected(
            "a prior in [0, 1], noise and steps of at least 0, a rate in (0, 1]",
            f"{prior}, {noise}, {steps}, {rate}",
        )
    if steps == 0 or prior in (0.0, 1.0):
        return prior
    if noise == 0:
        return 1.0
    whole = float(norm.cdf(norm.ppf(prior) + math.sqrt(steps) / noise))
    return whole if rate == 1 else min(whole, _sampled_bound(prior, noise, steps, rate))


def _sampled_bound(prior: float, noise: float, steps: int, rate: float) -> float:
    """Bound success by e^epsilon prior + delta, the best over the composed delta(epsilon)."""
    from vitguard.defenses.privacy.accounting import Ledger

    ledger = Ledger()
    ledger.record(noise, rate, steps)
    deltas = [10.0**-k for k in range(1, 10)]
    bounds = (math.exp(min(ledger.spent(d).epsilon, 700.0)) * prior + d for d in deltas)
    return min(1.0, *bounds)
