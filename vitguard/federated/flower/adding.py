"""What the strategies that add sealed updates share: no others on top, and metrics in common."""

from __future__ import annotations

from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from vitguard.errors import Incompatible

__all__ = ["refuse_other_strategies", "with_common_names"]


def refuse_other_strategies(kind: type, own: type) -> None:
    """Raise Incompatible if a subclass of `own` is a strategy of another kind as well.

    Such a strategy reads each update, or replaces the average: neither works on sealed values.
    """
    readers = [
        base.__name__
        for base in kind.__mro__
        if issubclass(base, Strategy)
        and not issubclass(base, own)
        and base not in (FedAvg, Strategy)
    ]
    if readers:
        raise Incompatible(
            f"Expected a strategy that adds updates, got {readers[0]}, which must read each update "
            f"or replaces the average. Use {own.__name__} alone."
        )


def with_common_names(contents: list[MetricRecord]) -> list[RecordDict]:
    """Return metrics of several clients with the names that all have: others cannot be averaged."""
    names = set.intersection(*(set(c) for c in contents))
    return [
        RecordDict({"metrics": MetricRecord({n: c[n] for n in c if n in names})}) for c in contents
    ]
