"""How well any test can tell who took part: the trade-off of false and true alarms."""

from __future__ import annotations

from typing import Literal

from vitguard.defenses.privacy.accounting import Ledger
from vitguard.defenses.privacy.trade_off import Power, check_level, power_of
from vitguard.errors import expected

__all__ = ["membership_bound"]


def membership_bound(
    false_positives: float,
    noise: float,
    steps: int,
    rate: float = 1.0,
    *,
    neighbours: Literal["joins", "replaced"] = "joins",
) -> float:
    """Return the largest true positive rate of any membership test at a false positive rate.

    The test sees every release of a Gaussian mechanism and knows all else. Without sampling the
    rate is Phi(Phi^-1(false_positives) + mu), mu = sqrt(steps) / noise where the record is there or
    is not, and twice that where it is there or another one is in its place: the sum then moves by
    two clips. With sampling both come from the composed privacy loss, from above.

    Args:
        false_positives: Rate in [0, 1] at which a record that was not there is called a member.
        noise: Noise multiplier, at least 0: standard deviation over the clip. 0 gives 1, no bound.
        steps: Releases, at least 0.
        rate: Poisson sampling rate in (0, 1].
        neighbours: `joins` (one record added or removed) or `replaced`.

    Raises:
        InputError: A value out of range.
        MissingExtra: opacus is not installed, and the rate is below 1.

    Reference: Dong, Roth and Su, arXiv:1905.02383: Gaussian differential privacy; a replaced record
    is one that is removed and one that joins, whose trade-offs compose (theorem 2.14).
    """
    check_level(false_positives)
    if not noise >= 0 or steps < 0 or not 0 < rate <= 1:
        raise expected(
            "noise and steps of at least 0 and a rate in (0, 1]", f"{noise}, {steps}, {rate}"
        )
    if neighbours not in ("joins", "replaced"):
        raise expected("neighbours joins or replaced", repr(neighbours))
    ledger = Ledger()
    ledger.record(noise, rate, steps)
    power = power_of(ledger.history)
    if neighbours == "joins":
        return power(false_positives)
    return power(_removed(power, false_positives))


def _removed(power: Power, level: float) -> float:
    """Return the power of telling that a record was removed, given that of telling that it joined.

    Where an event has probability at most `level` with the record, the opposite event has at least
    1 - level with it, hence at least the p with power(p) = 1 - level without it.
    """
    low, high = 0.0, 1.0
    if level in (0.0, 1.0):
        return level
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < 1 - level else (low, middle)
    return 1 - low
