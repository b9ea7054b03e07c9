"""Checking a privacy claim from outside: sensitivity, noise, a lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitguard.errors import expected

__all__ = [
    "AuditBound",
    "CanaryBound",
    "NoiseFit",
    "audit_epsilon",
    "canary_audit",
    "canary_bound",
    "measure_noise",
    "measure_sensitivity",
    "one_run_audit",
]

Total = Callable[[Sequence[int]], Tensor]


def measure_sensitivity(total: Total, count: int) -> float:
    """Return how far the sum moves at most when one of `count` examples leaves.

    Args:
        total: Returns the flat clipped sum of the examples with the given indices. Every random
            draw (mask, dropout, drop path) must follow the example's index: otherwise this
            measures how the generator shifts.

    NaN where the sum of all, or of all but one, is NaN.
    """
    if count < 1:
        raise expected("at least one example", count)
    everyone = range(count)
    whole = total(list(everyone))
    if not isinstance(whole, Tensor):
        raise expected("a sum that is one flat tensor", type(whole).__name__)
    whole = whole.double().clone()  # a sum that is written to one place each time stays
    moved = [
        float((whole - total([j for j in everyone if j != i]).double()).norm()) for i in everyone
    ]
    return float(torch.tensor(moved, dtype=torch.float64).max())  # built-in `max` drops NaN


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
    _require_finite(scores)
    order = scores.argsort()
    half = guesses // 2
    correct = int(included[order[-half:]].sum()) + int((~included[order[:half]]).sum())
    return audit_epsilon(2 * half, correct, canaries, delta, confidence)


@dataclass(frozen=True)
class CanaryBound:
    """What two samples of scores prove; all of it holds together with the given confidence.

    Args:
        thresholds: Lower bound on epsilon from error rates at a threshold; assumes nothing. It
            saturates near log(trials) - 2.
        gaussian: Lower bound on epsilon of normal scores with one variance on both sides, as a
            white-box adversary of a Gaussian mechanism has them; reaches any epsilon.
        mu: Lower bound on the distance of their means in standard deviations.
        ratio: `mu` as estimated, without the margin.
    """

    thresholds: float
    gaussian: float
    mu: float
    ratio: float
    delta: float
    confidence: float

    @property
    def epsilon(self) -> float:
        """The larger of the two bounds."""
        return max(self.thresholds, self.gaussian)


def canary_bound(
    absent: Tensor, present: Tensor, delta: float, confidence: float = 0.95
) -> CanaryBound:
    """Return the epsilon that scores without and with a canary prove.

    Args:
        absent, present: Independent finite scores, shape (trials,), larger where the canary is in.
        delta: Chance that the bound on epsilon may fail, in (0, 1).
        confidence: Chance that both bounds hold, in (0, 1).

    References:
        Error rates at a threshold: Nasr et al., arXiv:2101.04535, by Clopper and Pearson; the
        threshold comes from the first fifth of the scores, the rates from the others. Gaussian
        trade-off: Nasr et al., arXiv:2302.07956.
    """
    absent, present = absent.double().flatten(), present.double().flatten()
    if min(len(absent), len(present)) < 20 or not 0 < delta < 1 or not 0 < confidence < 1:
        raise expected(
            "at least 20 scores a side, delta and confidence in (0, 1)",
            f"{len(absent)}, {len(present)}, {delta}, {confidence}",
        )
    _require_finite(torch.cat([absent, present]))
    from vitguard.defenses.privacy.accounting import gaussian_epsilon

    failure = (1 - confidence) / 2  # for each of the two bounds
    mu, ratio = separation(absent, present, failure)
    gaussian = gaussian_epsilon(mu, delta) if mu < _FARTHEST else math.inf
    thresholds = _best_threshold(absent, present, delta, failure)
    return CanaryBound(thresholds, gaussian, mu, ratio, delta, confidence)


def _require_finite(scores: Tensor) -> None:
    """Raise InputError unless all scores are numbers: with NaN nothing would be proved."""
    if lost := int((~scores.isfinite()).sum()):
        raise expected(
            "finite scores", f"{lost} of {scores.numel()} that are not",
            "A release that overflows tells its records by that: leave such examples out of it.",
        )  # fmt: skip


_FARTHEST = 30.0  # mu beyond which epsilon is taken as infinite


def separation(absent: Tensor, present: Tensor, failure: float) -> tuple[float, float]:
    """Return a lower bound on the distance of two normal means in deviations, and its estimate.

    With probability 1 - failure / 2 each, the sample means are not further apart than the true ones
    plus a normal quantile, and the sample variance is not below a chi-square quantile.
    """
    from scipy.stats import chi2, norm

    n, m = len(absent), len(present)
    gap = float(present.mean() - absent.mean())
    freedom = n + m - 2
    squares = (n - 1) * float(absent.var()) + (m - 1) * float(present.var())
    deviation = math.sqrt(squares / freedom)
    if gap <= 0:
        return 0.0, 0.0
    if deviation == 0:
        return math.inf, math.inf
    ratio = gap / deviation
    shrink = math.sqrt(float(chi2.ppf(failure / 2, freedom)) / freedom)
    margin = float(norm.isf(failure / 2)) * math.sqrt(1 / n + 1 / m)
    return max(0.0, ratio * shrink - margin), ratio


def _best_threshold(absent: Tensor, present: Tensor, delta: float, failure: float) -> float:
    """Return epsilon from the rates at a threshold that other scores chose, over both tails."""
    import numpy as np

    first, second = len(absent) // 5, len(present) // 5
    tried = torch.cat([absent[:first], present[:second]])
    proved = 0.0
    for sign in (1.0, -1.0):  # the canary's tail, and the tail without it
        wrong, right = (absent, present) if sign > 0 else (present, absent)
        choose = _proved(
            sign * wrong[: len(wrong) // 5], sign * right[: len(right) // 5], sign * tried,
            delta, failure,
        )  # fmt: skip
        threshold = sign * tried[int(np.argmax(choose))]
        rest = sign * wrong[len(wrong) // 5 :], sign * right[len(right) // 5 :]
        proved = max(proved, float(_proved(*rest, threshold[None], delta, failure / 2)[0]))
    return proved


def _proved(wrong: Tensor, right: Tensor, thresholds: Tensor, delta: float, failure: float) -> Any:
    """Return, for each threshold t, log((P(right >= t) - delta) / P(wrong >= t)) from below."""
    import numpy as np
    from scipy.stats import beta

    def above(scores: Tensor) -> Any:
        ranked = scores.sort().values
        return len(ranked) - torch.searchsorted(ranked, thresholds).numpy()

    hits, alarms = above(right), above(wrong)
    low = np.where(hits > 0, beta.ppf(failure / 2, np.maximum(hits, 1), len(right) - hits + 1), 0.0)
    most = beta.isf(failure / 2, alarms + 1, np.maximum(len(wrong) - alarms, 1))
    high = np.where(alarms < len(wrong), most, 1.0)
    return np.log(np.maximum((low - delta) / high, 1.0))


def canary_audit(
    release: Callable[[bool], float],
    *,
    trials: int = 5000,
    delta: float = 1e-5,
    confidence: float = 0.95,
) -> CanaryBound:
    """Audit a mechanism by releasing with and without one canary, `trials` times each.

    The adversary knows all but whether the canary was in. It tries two scores: the release's own,
    and its difference to the release before, of which it knows everything. The second finds noise
    that was used twice.

    Args:
        release: Makes a release with or without the canary and returns its score: what is left of
            the sum without the other records, projected on the canary's clipped gradient in units
            of its norm squared, so that the mean is 0 or 1.
        trials: Releases on each side; even.
        confidence: Chance that everything in the result holds.
    """
    scores: dict[bool, list[float]] = {False: [], True: []}
    moved: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(trials):
        included = pair % 2 == 0
        before, after = release(not included), release(included)
        scores[not included].append(before)
        scores[included].append(after)
        moved[included].append(after - before + float(not included))
    level = (1 + confidence) / 2
    own, difference = (
        canary_bound(torch.tensor(s[False]), torch.tensor(s[True]), delta, level)
        for s in (scores, moved)
    )
    best = own if own.gaussian >= difference.gaussian else difference
    return CanaryBound(
        max(own.thresholds, difference.thresholds),
        best.gaussian, best.mu, best.ratio, delta, confidence,
    )  # fmt: skip
