"""The trade-off of a private mechanism: how much likelier its record can make anything.

Of two runs, one with a record and one without, whoever sees the release tests which it was. What
happens without the record with probability `level` (a false alarm, a lucky guess) happens with it
with probability `power(level)` at most. Membership and reconstruction both read this one curve.

The pair of runs is "with the record" and "without it" (one record added or removed). Under Poisson
sampling each release is then (1 - q) N(0, s^2) + q N(1, s^2) against N(0, s^2), in units of the
clip, whatever the data and however later steps depend on earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from vitguard.defenses.privacy.accounting import Entry, Ledger
from vitguard.errors import expected, missing_extra

__all__ = ["Power", "check_level", "gaussian_power", "power_of"]

Power = Callable[[float], float]
"""From a probability without the record to the largest one with it."""

_DELTA_ERROR = 1e-8  # of the discretised privacy loss: added to every power
_EPSILON_ERRORS = (4e-3, 1.6e-2, 6.4e-2)  # relative errors of the power; the first whose mesh fits
_MOST_POINTS = 1 << 21  # of the mesh: 16 MiB an array
_LEAST_NOISE = 0.05  # below it Opacus's discretisation leaves the range it was made for


def gaussian_power(level: float, mu: float) -> float:
    """Return the power between N(0, 1) and N(mu, 1): Phi(Phi^-1(level) + mu).

    Args:
        level: Probability without the record, in [0, 1].
        mu: Distance of the means in standard deviations, at least 0; infinite without noise.

    Raises:
        InputError: A value out of range.

    Reference: Dong, Roth and Su, arXiv:1905.02383, equation 6.
    """
    from scipy.special import ndtr, ndtri

    check_level(level)
    if not mu >= 0:
        raise expected("a mu of at least 0", mu)
    if level in (0.0, 1.0) or mu == 0:
        return float(level)
    return float(ndtr(ndtri(level) + mu))


def power_of(history: Sequence[Entry]) -> Power:
    """Return the power of all releases of a ledger together, from above.

    Without sampling it is exact. With it, the smaller of two upper bounds: the power without
    sampling, and that of the composed privacy loss L, from Opacus's discretisation of it with its
    errors added: whatever has probability `level` without the record has at most
    e^t level + E[max(0, 1 - e^(t - L))] with it, for every t.

    Args:
        history: Entries (noise multiplier, sampling rate, steps), as in `Ledger.history`.

    Raises:
        InputError: An entry is out of range.
        MissingExtra: opacus is not installed.

    References:
        Dominating pairs: Zhu, Dong and Wang, arXiv:2106.08567. Composition and its errors: Gopi,
        Lee and Wutschitz, arXiv:2106.02848, theorem 5.5.
    """
    entries = Ledger(history).history
    if any(noise == 0 for noise, _, _ in entries):
        mu = math.inf
    else:
        mu = math.sqrt(sum(n * (1 / noise) * (1 / noise) for noise, _, n in entries))

    def whole(level: float) -> float:
        return gaussian_power(level, mu)

    if mu == math.inf or all(rate == 1 for _, rate, _ in entries):
        return whole
    sampled = _sampled(entries) or _from_epsilon(entries)

    def power(level: float) -> float:
        check_level(level)
        if level in (0.0, 1.0):
            return float(level)
        return max(level, min(whole(level), sampled(level)))

    return power


def _sampled(entries: Sequence[Entry]) -> Power | None:
    """Return the power from the composed privacy loss; None where no mesh fits it."""
    import numpy as np

    if any(noise < _LEAST_NOISE for noise, _, _ in entries):
        return None
    for error in _EPSILON_ERRORS:
        composed = _composed(entries, error)
        if composed is None:
            continue
        losses = np.asarray(composed.domain.ts)
        masses = np.clip(composed.pmf, 0.0, None)  # what the transform left below 0 is rounding
        above = np.cumsum(masses[::-1])[::-1]
        scaled = np.cumsum((masses * np.exp(-losses))[::-1])[::-1]
        excess = np.clip(above - np.exp(losses) * scaled, 0.0, 1.0) + _DELTA_ERROR
        slopes = np.exp(losses + error)

        def power(level: float, slopes: Any = slopes, excess: Any = excess) -> float:
            return float(min(1.0, (slopes * level + excess).min()))

        return power
    return None


def _composed(entries: Sequence[Entry], error: float) -> Any:
    """Return Opacus's discrete privacy loss of all entries; None where its mesh is too fine."""
    try:
        from opacus.accountants.analysis import prv
    except ImportError as missing:
        raise missing_extra("Privacy accounting", "opacus") from missing
    losses = [prv.PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in entries]
    counts = [steps for _, _, steps in entries]
    mesh = error / math.sqrt(sum(counts) * math.log(12 / _DELTA_ERROR) / 2)
    try:
        reach = float(prv.compute_safe_domain_size(losses, counts, error, _DELTA_ERROR))
        if not (math.isfinite(reach) and 2 * reach / mesh < _MOST_POINTS):
            return None
        domain = prv.Domain.create_aligned(-reach, reach, mesh)
        cut = [prv.TruncatedPrivacyRandomVariable(x, domain.t_min, domain.t_max) for x in losses]
        return prv.compose_heterogeneous([prv.discretize(x, domain) for x in cut], counts)
    except (ArithmeticError, RuntimeError, ValueError, MemoryError):
        return None


def _from_epsilon(entries: Sequence[Entry]) -> Power:
    """Return the least e^epsilon level + delta over some delta, by Renyi privacy: coarse."""
    ledger = Ledger(entries)
    spent = [(ledger.spent(10.0**-k, "rdp").epsilon, 10.0**-k) for k in range(1, 10)]
    lines = [(math.exp(epsilon), delta) for epsilon, delta in spent if epsilon < 700]

    def power(level: float) -> float:
        return min([1.0, *(slope * level + delta for slope, delta in lines)])

    return power


def check_level(level: float) -> None:
    """Raise InputError unless `level` is a probability."""
    if not 0 <= level <= 1:
        raise expected("a probability in [0, 1]", level)
