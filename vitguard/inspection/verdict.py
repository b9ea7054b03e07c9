"""What an inspection says: signs, each a number with its limit and its meaning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["NOTHING_SEEN", "Inspection", "Sign"]

NOTHING_SEEN = (
    "no signs of a known craft were seen, which is no proof of honest weights: a craft that knows "
    "these signs can stay below their limits"
)


@dataclass(frozen=True)
class Sign:
    """One number that crafted weights move, where it was largest.

    Args:
        name: Of the sign, as in `vitguard.inspection.SIGNS`.
        where: The parameter or module with the largest value.
        value: At least 0; honest weights have small ones.
        limit: Above it the weights are suspicious; above 0.
        meaning: What the number is.
    """

    name: str
    where: str
    value: float
    limit: float
    meaning: str

    @property
    def excess(self) -> float:
        """Value over limit; infinite for a value that is not a number."""
        return math.inf if math.isnan(self.value) else self.value / self.limit

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3g} (limit {self.limit:.3g}) at {self.where}"


@dataclass(frozen=True)
class Inspection:
    """What was seen of weights that a server handed out. It never says that they are safe.

    Args:
        signs: Every sign that was looked at.
        notes: What could not be looked at, and why.
        limit: Factor on the limits of the signs.
    """

    signs: tuple[Sign, ...]
    notes: tuple[str, ...] = ()
    limit: float = 1.0

    @property
    def score(self) -> float:
        """The largest excess of a sign over its limit, at least 0; suspicious above `limit`."""
        return max((s.excess for s in self.signs), default=0.0)

    @property
    def worst(self) -> tuple[Sign, ...]:
        """The signs beyond their limits, the clearest first."""
        beyond = [s for s in self.signs if s.excess > self.limit]
        return tuple(sorted(beyond, key=lambda s: -s.excess))

    @property
    def suspicious(self) -> bool:
        """Whether a sign of crafted weights is beyond its limit."""
        return bool(self.worst)

    @property
    def reason(self) -> str:
        """One line: what is suspicious, or that no known sign was seen."""
        if not self.worst:
            return NOTHING_SEEN
        return "; ".join(f"{s}: {s.meaning}" for s in self.worst[:3])

    def and_also(self, signs: Iterable[Sign], notes: Iterable[str] = ()) -> Inspection:
        """Return the inspection with further signs and notes."""
        return Inspection((*self.signs, *signs), (*self.notes, *notes), self.limit)

    def __str__(self) -> str:
        head = "suspicious" if self.suspicious else "not suspicious"
        return "\n".join((f"{head}: {self.reason}", *map(str, self.signs), *self.notes))
