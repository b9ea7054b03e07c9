"""Records of Flower and messages of NVFlare, where these are installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzzing.mutations import Chance, Fault
from vitguard.errors import VitguardError

__all__ = ["FlowerRecords", "NVFlareMessages", "installed"]

STYPES = ("numpy.ndarray", "vitguard.sealed", "pickle", "", "x" * 100)
NAMES = (
    "vitguard.step.1.sum", "vitguard.step.9.plain.p", "vitguard.step.-1.sum", "vitguard.step.1",
)  # fmt: skip
KINDS = ("uint8", "float32", "object", "<f4", "complex64", "O", "x", "")


def installed() -> dict[str, tuple[type, str, float]]:
    """Return the kinds that can be tried here, as `KINDS` of the program has them."""
    kinds: dict[str, tuple[type, str, float]] = {}
    if find_spec("flwr"):
        kinds["records of Flower"] = (FlowerRecords, "tried", 0.05)
    if find_spec("nvflare"):
        kinds["messages of NVFlare"] = (NVFlareMessages, "tried", 0.05)
    return kinds


class FlowerRecords:
    """The record of a model that the server cannot read: its start, sums and plain steps."""

    def __init__(self, folder: Path) -> None:
        from vitguard.federated.flower.records import History, Step

        start = {"w": torch.randn(3, 2), "n": torch.tensor(4)}
        steps = tuple(Step(n, b"a sum" * n, {"p": torch.ones(2)}) for n in (1, 2))
        self.honest = History(start, steps, run=bytes(16))

    def tried(self, chance: Chance) -> str:
        """Change names, types, shapes and bytes of arrays; what is read is what it says."""
        from flwr.app import Array, ArrayRecord

        from vitguard.federated.flower.records import History

        arrays: dict[str, Any] = dict(self.honest.record())
        for _ in range(chance.choice((1, 1, 2))):
            name = chance.choice(sorted(arrays))
            array = arrays[name]
            parts = {
                "dtype": array.dtype, "shape": tuple(array.shape), "stype": array.stype,
                "data": array.data,
            }  # fmt: skip
            kind = chance.randrange(6)
            if kind == 0:
                arrays[chance.choice((*NAMES, name + "x"))] = arrays.pop(name)
                continue
            if kind == 1:
                parts["data"] = chance.flip(array.data, [array.data])
            elif kind == 2:
                parts["stype"] = chance.choice(STYPES)
            elif kind == 3:
                parts["dtype"] = chance.choice(KINDS)
            elif kind == 4:
                parts["shape"] = chance.choice(((), (1,), (-1,), (2**40,), (0,), (3, 2, 1)))
            else:
                del arrays[name]
                if not arrays:
                    return "refused"
                continue
            arrays[name] = Array(**parts)
        try:
            read = History.of(ArrayRecord(arrays))
            version = read.version()
        except VitguardError:
            return "refused"
        for step in read.steps:
            array = arrays[f"vitguard.step.{step.number}.sum"]
            if step.total != array.data:
                raise Fault("a sum with other bytes than the record has")
        return "same" if version == self.honest.version() else "other"

    def close(self) -> None:
        """Nothing is left to check."""


class NVFlareMessages:
    """A client's reply: its one DXO, tensors, weight, round, headers and metrics."""

    def __init__(self, folder: Path) -> None:
        """Nothing is needed before a try."""

    def tried(self, chance: Chance) -> str:
        """Put something else into one part; each reader refuses it in words."""
        from nvflare.apis.dxo import DXO, DataKind
        from nvflare.apis.fl_constant import FLMetaKey
        from nvflare.app_common.app_constant import AppConstants

        from vitguard.federated.nvflare import messages

        data: dict[Any, Any] = {"w": torch.ones(2), "b": torch.zeros(())}
        meta: dict[str, Any] = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: 3}
        odd = chance.choice((chance.odd(), np.ones(2), b"x", torch.ones(1), object()))
        kind, round_id, extra = chance.randrange(7), 1, {}
        if kind == 0:
            data[chance.choice(("w", 3, None, f"{messages.SUM}1", f"{messages.SUM}x"))] = odd
        elif kind == 1:
            meta[FLMetaKey.NUM_STEPS_CURRENT_ROUND] = odd
        elif kind == 2:
            round_id = odd
        elif kind == 3:
            extra = {"more": odd}
        elif kind == 4:
            meta["initial_metrics"] = odd
        elif kind == 5:
            data = {}
        shareable = DXO(DataKind.WEIGHT_DIFF, data=data, meta=meta).to_shareable()
        shareable.update(extra)
        shareable.set_header(AppConstants.CURRENT_ROUND, round_id)
        if kind == 6:
            shareable.set_header(chance.choice(messages._HEADERS), odd)
        ended = "same"
        try:
            dxo = messages.sole_dxo(shareable, DataKind.WEIGHT_DIFF)
            messages.round_of(shareable)
            messages.weight_of(dxo)
            messages.metrics_of(dxo)
            messages.bare(shareable)
            if messages.sums_in(dxo) is None:
                tensors = messages.tensors_of(dxo)
                messages.refuse_tensors(tensors)
                ended = "same" if set(tensors) == {"w", "b"} else "other"
        except VitguardError:
            return "refused"
        return ended

    def close(self) -> None:
        """Nothing is left to check."""
