"""How often any attack can reconstruct a record: reconstruction robustness of DP-SGD."""

from __future__ import annotations

from vitguard.defenses.privacy.accounting import Ledger
from vitguard.defenses.privacy.trade_off import check_level, power_of
from vitguard.errors import expected

__all__ = ["reconstruction_bound"]


def reconstruction_bound(prior: float, noise: float, steps: int, rate: float = 1.0) -> float:
    """Return the most often that any attack reconstructs one record of a Gaussian mechanism.

    An attack that sees every release and knows all other records, the weights, the clip and the
    noise, but not which of many candidates the record was. Without sampling the bound is
    Phi(Phi^-1(prior) + sqrt(steps) / noise).

    The question is which record it was, and yet what counts is one record added or removed, with a
    sensitivity of one clip: the run is compared with one in which the record is left out. That
    run knows nothing of the record, so the attack succeeds there as often as a blind guess. Two
    candidates whose gradients are opposite are two clips apart, and the best test between them
    reaches this bound exactly (prior 1/2).

    Args:
        prior: Chance in [0, 1] that a guess succeeds without seeing anything; what counts as
            success is up to the caller.
        noise: Noise multiplier, at least 0: standard deviation over the clip. 0 gives 1, no bound.
        steps: Releases, at least 0.
        rate: Poisson sampling rate in (0, 1]. Batch sizes must be public, or tell nothing of the
            record.

    Raises:
        InputError: A value out of range.
        MissingExtra: opacus is not installed, and the rate is below 1.

    References:
        Balle, Cherubin and Hayes, arXiv:2201.04845; Hayes, Mahloujifar and Balle, arXiv:2302.07225,
        whose Monte Carlo estimate is an upper bound here.
    """
    check_level(prior)
    if not noise >= 0 or steps < 0 or not 0 < rate <= 1:
        raise expected(
            "noise and steps of at least 0 and a rate in (0, 1]", f"{noise}, {steps}, {rate}"
        )
    ledger = Ledger()
    ledger.record(noise, rate, steps)
    return power_of(ledger.history)(prior)
