"""What travels in Flower's records: starting weights, sealed updates, and the sums since."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from vitguard.defenses.encryption import model_version
from vitguard.errors import Rejected
from vitguard.federated.flower.snapshots import Snapshot
from vitguard.rounds import first_version, next_version

__all__ = [
    "BASE",
    "ROUND",
    "RUN",
    "SEALED",
    "SEALED_TYPE",
    "SNAPSHOT",
    "VOUCH",
    "WEIGHTED",
    "History",
    "Step",
    "drawn_name",
    "from_arrays",
    "sealed_array",
    "snapshot_array",
    "started",
    "take_snapshot",
    "to_arrays",
]

ROUND, BASE = "vitguard-round", "vitguard-base"  # in the ConfigRecord of a message
RUN = "vitguard.run"
"""Where the name of a run or a masked round is said: an array, or a value of a ConfigRecord."""
_NAME = 16  # bytes of it
SNAPSHOT = "vitguard-snapshot"  # there too: "vouch" for the model, or "send" it
WEIGHTED = "vitguard-weighted-by"  # there as well: the metric that is the client's weight
VOUCH = "vitguard.vouch"
"""Name of the array with a client's proof of the weights it has."""
SEALED = "vitguard.sealed"
"""Name of the array that holds ciphertext."""
SEALED_TYPE = (
    "vitguard.sealed (nobody reads a single update; encrypted, clients alone read the sum)"
)
"""Its type: whoever asks Flower for the numbers in it is told this in an error."""
_WHOLE = re.compile(r"vitguard\.snapshot\.(\d{1,18})")
_STEP = re.compile(r"vitguard\.step\.(\d{1,18})\.(sum|plain\.(.+))")


def sealed_array(data: bytes) -> Array:
    """Return ciphertext as an array that nothing takes for numbers."""
    return Array(dtype="uint8", shape=(len(data),), stype=SEALED_TYPE, data=data)


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return plain tensors as Flower's arrays, each of the shape it has."""
    # np.ascontiguousarray would give a single number, such as a counter, a dimension
    return ArrayRecord({n: Array(np.asarray(_plain(t), order="C")) for n, t in tensors.items()})


def _plain(tensor: Tensor) -> np.ndarray:
    held = tensor.detach().cpu()
    return (held.float() if held.dtype == torch.bfloat16 else held).numpy()  # NumPy has no bfloat16


def from_arrays(record: Mapping[str, Array]) -> dict[str, Tensor]:
    """Return Flower's arrays as tensors of their own memory.

    Raises:
        Rejected: One holds no plain numbers.
    """
    tensors = {}
    for name, array in record.items():
        try:
            found = array.numpy()  # NumPy reads into memory of its own
            tensors[name] = torch.from_numpy(found if found.flags.writeable else found.copy())
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
        plain = {
            f"{start}.plain.{n}": Array(np.asarray(t.numpy(), order="C"))
            for n, t in self.plain.items()
        }
        return {f"{start}.sum": sealed_array(self.total), **plain}


def snapshot_array(snapshot: Snapshot) -> dict[str, Array]:
    """Return a sealed model as an array by name."""
    return {f"vitguard.snapshot.{snapshot.number}": sealed_array(snapshot.to_bytes())}


def take_snapshot(arrays: dict[str, Array]) -> Snapshot | None:
    """Take the sealed model out of arrays by name; None where there is none.

    Raises:
        Rejected: There are several, or what is there is none.
    """
    found = [name for name in arrays if _WHOLE.fullmatch(name)]
    if not found:
        return None
    if len(found) > 1 or arrays[found[0]].stype != SEALED_TYPE:
        raise Rejected("snapshot", "several sealed models, or one of another type", "one")
    number = int(found[0].rpartition(".")[2])
    return Snapshot.from_bytes(number, arrays.pop(found[0]).data)


def drawn_name() -> bytes:
    """Return a name that no run and no masked round had before."""
    return secrets.token_bytes(_NAME)


def started(weights: Mapping[str, Tensor], run: object) -> str:
    """Return the version of weights at the start of a run or a masked round.

    Raises:
        Rejected: The run is not named as a server of vitguard names it.
    """
    if not isinstance(run, bytes) or len(run) != _NAME:
        raise Rejected("run", "none", f"the name of its run beside a start, {_NAME} bytes")
    return first_version(model_version(weights), run)


@dataclass(frozen=True)
class History:
    """A global model that the server cannot read: what it goes on from, and the steps since.

    Args:
        start: The weights of the first start; later on the server reads only their shapes.
        steps: The rounds since the start, or since the snapshot where there is one.
        snapshot: The model before the steps, sealed by a client; None at first.
        run: Name of the run, which the server draws at its start: each version of the model
            depends on it. Empty where there is no start.
    """

    start: Mapping[str, Tensor]
    steps: tuple[Step, ...] = field(default=())
    snapshot: Snapshot | None = None
    run: bytes = b""

    def version(self) -> str:
        """Return the version of the model after all steps."""
        return self._version

    @cached_property
    def _version(self) -> str:
        base = self.snapshot.version if self.snapshot else started(self.start, self.run)
        for step in self.steps:
            base = step.version(base)
        return base

    @property
    def last_round(self) -> int:
        """The number of the last round in the model, 0 for none."""
        if self.steps:
            return self.steps[-1].number
        return self.snapshot.number if self.snapshot else 0

    @property
    def next_round(self) -> int:
        """The number of the round to come."""
        return self.last_round + 1

    def after(self, step: Step, snapshot: Snapshot | None = None) -> History:
        """Return the history with one more step; a snapshot stands for all before it."""
        if snapshot is None:
            history = replace(self, steps=(*self.steps, step))
        else:
            history = replace(self, steps=(step,), snapshot=snapshot)
        known = step.version(self.version())  # not by hashing all sums anew
        history.__dict__["_version"] = known
        return history

    def since(self, number: int | None) -> History:
        """Return what a client lacks that has everything up to a round, None for one with nothing.

        Where a step before the snapshot is lacking it is the snapshot and the steps after it.
        """
        if self.snapshot is None:
            steps = tuple(s for s in self.steps if s.number > (0 if number is None else number))
            return (
                History(self.start, steps, run=self.run) if number is None else History({}, steps)
            )
        if number is None or number < self.snapshot.number:
            return History({}, self.steps, self.snapshot)
        return History({}, tuple(s for s in self.steps if s.number > number))

    def record(self) -> ArrayRecord:
        """Return it as one record: what is sent, and what a server saves to go on later."""
        whole = snapshot_array(self.snapshot) if self.snapshot else {}
        steps = [a for s in self.steps for a in s.arrays().items()]
        run = {RUN: sealed_array(self.run)} if self.run else {}
        return ArrayRecord({**to_arrays(self.start), **run, **whole, **dict(steps)})

    @staticmethod
    def of(record: ArrayRecord) -> History:
        """Read what `record` returned, or the plain weights of a start.

        Raises:
            Rejected: It holds something else.
        """
        arrays = dict(record)
        run = arrays.pop(RUN).data if RUN in arrays else b""
        snapshot = take_snapshot(arrays)
        start: dict[str, Array] = {}
        totals: dict[int, bytes] = {}
        plain: dict[int, dict[str, Array]] = {}
        for name, array in arrays.items():
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
        return History(from_arrays(start), tuple(steps), snapshot, run)
