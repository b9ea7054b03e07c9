"""What was spent: a ledger of releases as plain data, and epsilon from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vitguard.errors import expected, missing_extra

__all__ = ["Ledger", "PrivacySpent", "gaussian_delta", "gaussian_epsilon", "noise_for"]

Accountant = Literal["prv", "rdp"]
_ACCOUNTANTS = ("prv", "rdp")


@dataclass(frozen=True)
class PrivacySpent:
    """What the releases of a ledger add up to: (epsilon, delta) for adding or removing one record.

    Under `ClientPrivacy` the record is the client's whole data set.

    `epsilon` is infinite when a release carried no noise.
    """

    epsilon: float
    delta: float
    steps: int
    accountant: str

    def __str__(self) -> str:
        return (
            f"epsilon {self.epsilon:.3g} at delta {self.delta:.3g} after {self.steps} steps "
            f"({self.accountant})"
        )


@dataclass
class Ledger:
    """Every release of the subsampled Gaussian mechanism, in order, and nothing else.

    Args:
        history: Entries (noise multiplier, sampling rate, steps).

    Guarantees:
        Composition over rounds and checkpoints: a ledger that was saved and loaded continues, and
        rounds of any length spend what one run of the same steps spends.
    """

    history: list[tuple[float, float, int]] = field(default_factory=list)

    def record(self, noise: float, rate: float, steps: int = 1) -> None:
        """Add releases with noise of standard deviation `noise * clip` and Poisson rate `rate`."""
        if not noise >= 0 or not 0 < rate <= 1 or steps < 0:
            raise expected(
                "noise of at least 0, a rate in (0, 1] and steps of at least 0",
                f"{noise}, {rate}, {steps}",
            )
        if self.history and self.history[-1][:2] == (noise, rate):
            steps += self.history.pop()[2]
        if steps:
            self.history.append((float(noise), float(rate), int(steps)))

    @property
    def steps(self) -> int:
        """Number of releases."""
        return sum(steps for _, _, steps in self.history)

    def spent(self, delta: float, accountant: str = "prv") -> PrivacySpent:
        """Return epsilon at `delta` in (0, 1).

        Releases without subsampling compose exactly (Balle and Wang, arXiv:1805.06530); the others
        by Opacus's accountant, whose upper bound is returned.
        """
        if not 0 < delta < 1:
            raise expected("delta in (0, 1)", delta)
        if accountant not in _ACCOUNTANTS:
            raise expected(f"accountant among {', '.join(_ACCOUNTANTS)}", repr(accountant))
        if not self.history:
            return PrivacySpent(0.0, delta, 0, accountant)
        if any(noise == 0 for noise, _, _ in self.history):
            return PrivacySpent(math.inf, delta, self.steps, accountant)
        if all(rate == 1 for _, rate, _ in self.history):
            mu = math.sqrt(sum(steps / noise**2 for noise, _, steps in self.history))
            return PrivacySpent(gaussian_epsilon(mu, delta), delta, self.steps, "gaussian")
        epsilon = _epsilon(self._merged(), delta, accountant)
        return PrivacySpent(epsilon, delta, self.steps, accountant)

    def _merged(self) -> list[tuple[float, float, int]]:
        """Return the history with equal entries together: order does not matter to epsilon."""
        merged: dict[tuple[float, float], int] = {}
        for noise, rate, steps in self.history:
            merged[noise, rate] = merged.get((noise, rate), 0) + steps
        return [(*key, steps) for key, steps in merged.items()]

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger as plain numbers and lists."""
        return {"version": 1, "history": [list(entry) for entry in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a `state_dict` left off.

        Raises:
            InputError: The state is not one of a ledger; the ledger is unchanged.
        """
        fresh = Ledger()
        try:
            if state["version"] != 1:
                raise expected("a ledger of version 1", state["version"])
            for noise, rate, steps in state["history"]:
                fresh.record(float(noise), float(rate), int(steps))
        except (KeyError, TypeError, ValueError) as error:
            raise expected("a state from Ledger.state_dict", repr(error)) from error
        self.history = fresh.history


def _epsilon(history: Sequence[tuple[float, float, int]], delta: float, accountant: str) -> float:
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant
    except ImportError as error:
        raise missing_extra("Privacy accounting", "opacus") from error
    rdp = RDPAccountant()
    rdp.history = list(history)
    bound = float(rdp.get_epsilon(delta=delta))
    if accountant == "rdp":
        return bound
    prv = PRVAccountant()
    prv.history = list(history)
    # The default error of 0.01 would be most of a small epsilon: half a percent of the RDP bound.
    error = min(0.01, max(5e-3 * bound, 1e-4))
    try:
        epsilon = float(prv.get_epsilon(delta=delta, eps_error=error))
    except (RuntimeError, ValueError, FloatingPointError):
        return bound  # the discretisation does not fit; RDP is an upper bound as well
    return min(epsilon, bound) if math.isfinite(epsilon) and epsilon >= 0 else bound


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the exact delta of a Gaussian mechanism with sensitivity / deviation `mu`.

    Reference: Balle and Wang, arXiv:1805.06530, theorem 8.
    """
    from scipy.special import log_ndtr
    from scipy.stats import norm

    first = float(norm.cdf(mu / 2 - epsilon / mu))
    return first - math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the exact epsilon at `delta` of a Gaussian mechanism with the given `mu`."""
    if mu == 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, high * 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def noise_for(
    epsilon: float, delta: float, rate: float, steps: int, accountant: str = "prv"
) -> float:
    """Return the smallest noise multiplier, to 0.1 %, that spends at most `epsilon`.

    Raises:
        InputError: Even a noise multiplier of 10000 spends more.
    """

    def spends(noise: float) -> float:
        ledger = Ledger()
        ledger.record(noise, rate, steps)
        return ledger.spent(delta, accountant).epsilon

    low, high = 0.0, 1.0
    while spends(high) > epsilon:
        low, high = high, high * 2
        if high > 1e4:
            raise expected("an epsilon that noise can reach", f"{epsilon} at delta {delta}")
    floor = 0.05  # below it accountants leave the range they were made for
    while high - low > 1e-3 * high and high > floor:
        middle = (low + high) / 2
        low, high = (middle, high) if spends(middle) > epsilon else (low, middle)
    return high
