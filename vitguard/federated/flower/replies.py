"""A client's reply as a strategy takes it: sealed bytes, their weight, and what stays plain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from logging import WARNING

from flwr.app import Array, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from torch import Tensor

from vitguard.errors import Rejected
from vitguard.federated.flower.records import SEALED, SEALED_TYPE

__all__ = ["PlainSum", "Reply", "content_of", "in_one_line"]

_LONGEST = 600  # characters of a line


def in_one_line(said: object) -> str:
    """Return what a client said, or an error that quotes it, as one short line for a log."""
    line = "".join(c if c.isprintable() else " " for c in str(said)[:_LONGEST])
    return line if len(str(said)) <= _LONGEST else f"{line} ..."


def content_of(message: Message) -> RecordDict:
    """Return what a client answered, or raise Rejected with the reason that it gave."""
    if message.has_error():
        reason = (message.error.reason or "an error")[:500].rstrip(".")
        raise Rejected("error", reason, "an answer")
    return message.content


@dataclass(frozen=True)
class Reply:
    """What a client's reply says, before any of it is added.

    Args:
        sealed: The ciphertext, or the masked values.
        weight: Of the client in the average, as it claims.
        arrays: The other arrays, by name.
        metrics: All that it measured.
    """

    sealed: bytes
    weight: float
    arrays: dict[str, Array]
    metrics: MetricRecord

    @classmethod
    def of(cls, message: Message, *, weighted_by: str, max_clipped: int | None) -> Reply:
        """Read a reply.

        Args:
            weighted_by: The metric that is the weight.
            max_clipped: The most values that were moved to their bound; None for any.

        Raises:
            Rejected: It is an error, has other records, nothing sealed or no weight, or too many
                values were clipped.
        """
        content = content_of(message)
        if len(content.array_records) != 1 or len(content.metric_records) != 1:
            raise Rejected("records", "other records", "one of arrays and one of metrics")
        arrays = dict(next(iter(content.array_records.values())))
        metrics = next(iter(content.metric_records.values()))
        sealed = arrays.pop(SEALED, None)
        if sealed is None or sealed.stype != SEALED_TYPE:
            raise Rejected("plain", "weights with nothing sealed", "a reply through ProtectMod")
        weight, clipped = metrics.get(weighted_by), metrics.get("vitguard-clipped", 0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise Rejected("weight", f"no {weighted_by} among the metrics", "a number")
        if max_clipped is not None and not (type(clipped) is int and 0 <= clipped <= max_clipped):
            raise Rejected("clipped", f"{clipped} values beyond bounds", "fewer")
        return cls(sealed.data, weight, arrays, metrics)


class PlainSum:
    """The weighted sum of what clients send in the clear.

    A tensor that half of the clients or fewer send stays as it is: no single client says what is
    sent. One that a client leaves out counts as unchanged by it.

    Args:
        start: Weights before the round.
        sealed: Names that nobody may send in the clear.
    """

    def __init__(self, start: Mapping[str, Tensor], sealed: Collection[str]) -> None:
        self._start, self._sealed = start, sealed
        self._sums: dict[str, Tensor] = {}
        self._sent: Counter[str] = Counter()
        self._clients = 0

    def check(self, changes: Mapping[str, Tensor]) -> None:
        """Raise Rejected where changes cannot be added."""
        for name, change in changes.items():
            start = self._start.get(name)
            if start is None or name in self._sealed or change.shape != start.shape:
                raise Rejected("array", f"{name[:80]} of shape {tuple(change.shape)}")
            after = start + change.to(start.dtype)  # a larger type holds what this one does not
            if not (change.is_floating_point() and bool(after.isfinite().all())):
                raise Rejected("array", f"{name} with values that are not finite")

    def add(self, changes: Mapping[str, Tensor], weight: float) -> None:
        """Add changes that `check` let through."""
        self._clients += 1
        for name, change in changes.items():
            share = change.double() * weight
            self._sums[name] = self._sums[name] + share if name in self._sums else share
            self._sent[name] += 1

    def mean(self, weight: float) -> dict[str, Tensor]:
        """Return the average for clients of that weight together, of what most of them sent."""
        few = sorted(n for n, count in self._sent.items() if 2 * count <= self._clients)
        if few:
            log(WARNING, "Plain tensors that no more than half sent stay as they are: %.500s", few)
        return {name: total / weight for name, total in self._sums.items() if name not in few}
