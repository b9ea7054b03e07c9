"""What travels in Flower's records: starting weights, sealed updates, and the sums since."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from vitguard.defenses.encryption import model_version
from vitguard.errors import Rejected
from vitguard.rounds import next_version

__all__ = ["BASE", "ROUND", "SEALED", "History", "Step", "from_arrays", "sealed_array", "to_arrays"]

ROUND, BASE = "vitguard-round", "vitguard-base"  # in the ConfigRecord of a message
SEALED = "vitguard.sealed"
"""Name and type of the array that holds ciphertext; no weights can be made of it."""
_STEP = re.compile(r"vitguard\.step\.(\d{1,18})\.(sum|plain\.(.+))")


def sealed_array(data: bytes) -> Array:
    """Return ciphertext as an array that nothing takes for numbers."""
    return Array(dtype="uint8", shape=(len(data),), stype=SEALED, data=data)


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return plain tensors as Flower's arrays."""
    return ArrayRecord({n: Array(np.ascontiguousarray(t.numpy())) for n, t in tensors.items()})


def from_arrays(record: Mapping[str, Array]) -> dict[str, Tensor]:
    """Return Flower's arrays as tensors of their own memory.

    Raises:
        Rejected: One holds no plain numbers.
    """
    tensors = {}
    for name, array in record.items():
        try:
            tensors[name] = torch.from_numpy(np.array(array.numpy()))
        except Exception as error:  # foreign bytes: numpy and torch raise whatever they like
            raise Rejected("array", f"{name}, of type {array.stype[:40]!r}", "numbers") from error
    return tensors


@dataclass(frozen=True)
class Step:
    """What one round added to the model: the encrypted sum, and the average of what was plain."""

    number: int
    total: bytes
    plain: Mapping[str, Tensor]

    def version(self, base: str) -> str:
        """Return the model's version after this step."""
        plain = hashlib.sha256(model_version(self.plain).encode()).digest()
        return next_version(base, plain + self.total)

    def arrays(self) -> dict[str, Array]:
        """Return the step as arrays by name."""
        start = f"vitguard.step.{self.number}"
        plain = {f"{start}.plain.{n}": Array(t.numpy()) for n, t in self.plain.items()}
        return {f"{start}.sum": sealed_array(self.total), **plain}


@dataclass(frozen=True)
class History:
    """A global model that the server cannot read: the weights it started from, and its steps."""

    start: Mapping[str, Tensor]
    steps: tuple[Step, ...] = field(default=())

    def version(self) -> str:
        """Return the version of the model after all steps."""
        base = model_version(self.start)
        for step in self.steps:
            base = step.version(base)
        return base

    @property
    def next_round(self) -> int:
        """The number of the round to come."""
        return self.steps[-1].number + 1 if self.steps else 1

    def since(self, number: int) -> History:
        """Return what a client lacks that has everything up to a round."""
        return History({}, tuple(s for s in self.steps if s.number > number))

    def record(self) -> ArrayRecord:
        """Return it as one record: what is sent, and what a server saves to go on later."""
        steps = [a for s in self.steps for a in s.arrays().items()]
        return ArrayRecord({**to_arrays(self.start), **dict(steps)})

    @staticmethod
    def of(record: ArrayRecord) -> History:
        """Read what `record` returned, or the plain weights of a start.

        Raises:
            Rejected: It holds something else.
        """
        start: dict[str, Array] = {}
        totals: dict[int, bytes] = {}
        plain: dict[int, dict[str, Array]] = {}
        for name, array in record.items():
            found = _STEP.fullmatch(name)
            if found is None:
                start[name] = array
            elif found[3] is None:
                totals[int(found[1])] = array.data
            else:
                plain.setdefault(int(found[1]), {})[found[3]] = array
        if plain.keys() - totals.keys():
            raise Rejected("array", "a step without its sum", "steps as they were made")
        steps = (Step(n, totals[n], from_arrays(plain.get(n, {}))) for n in sorted(totals))
        return History(from_arrays(start), tuple(steps))
