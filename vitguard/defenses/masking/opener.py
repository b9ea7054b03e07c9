"""Opens the signed sums of a masked run."""

from __future__ import annotations

import math
import threading

import numpy as np
from torch import Tensor

from vitguard.defenses.encryption.manifest import LIGHTEST
from vitguard.defenses.masking import wire
from vitguard.defenses.masking.terms import Terms, check_terms
from vitguard.defenses.masking.values import average
from vitguard.errors import Rejected, expected

__all__ = ["SumOpener"]


class SumOpener:
    """Checks the server's signature and reads the average. Thread-safe; it holds no secret.

    Guarantees:
        A round is opened once, and rounds only go forward.

    Args:
        terms: What all parties agreed on.
        opened: The last round that was opened before, -1 for none.
    """

    def __init__(self, terms: Terms, *, opened: int = -1) -> None:
        check_terms(terms)
        if type(opened) is not int or opened < -1:
            raise expected("the number of the last round opened, or -1", repr(opened)[:80])
        self.terms, self._opened = terms, opened
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"SumOpener(opened={self._opened})"

    @property
    def opened(self) -> int:
        """The last round that was opened, -1 for none."""
        return self._opened

    def open(self, data: bytes, *, round_id: int, base: str = "") -> dict[str, Tensor]:
        """Return the weighted average by name.

        Raises:
            Rejected: The server did not sign it for this round, the round was opened before, it is
                of fewer clients than the threshold, or a value is beyond its bound.
        """
        terms, size = self.terms, wire.SUM_HEAD.size
        _, body = wire.open_message(data, wire.SUM, terms, terms.binding(round_id, base))
        if len(body) != size + 4 * terms.manifest.values:
            raise Rejected("counts", f"{len(body)} bytes of values where others were due")
        weight, clients = wire.SUM_HEAD.unpack_from(body)
        if not terms.threshold <= clients <= len(terms.identities):
            raise Rejected("clients", f"a sum of {clients} clients")
        most = terms.manifest.max_weight
        if not (math.isfinite(weight) and LIGHTEST * most <= weight <= most * clients * 1.000001):
            raise Rejected("weight", f"a sum of weight {weight}")
        with self._lock:
            if round_id <= self._opened:
                raise Rejected("replay", f"round {round_id} after round {self._opened}")
            total = np.frombuffer(body, "<u4", offset=size).astype(np.uint32, copy=False)
            tensors = average(total, terms, weight, clients)
            self._opened = round_id
        return tensors
