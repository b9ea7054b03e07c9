"""The tensors of a batch, whatever holds them: also what torch's trees take for one thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["change_tensors", "tensors_of"]


def change_tensors(change: Callable[[Tensor], Any], batch: Any) -> Any:
    """Return a batch of the same kind with each of its tensors changed.

    Lists, tuples, mappings of any kind (a `BatchFeature` of transformers) and dataclasses are
    looked into; anything else stays.
    """

    def each(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, Mapping):
            made: Any = type(leaf)
            return made({k: change_tensors(change, v) for k, v in leaf.items()})
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            parts = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if f.init}
            return dataclasses.replace(
                leaf, **{k: change_tensors(change, v) for k, v in parts.items()}
            )
        return leaf

    return tree_map(each, batch)


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    change_tensors(note, batch)
    return found
