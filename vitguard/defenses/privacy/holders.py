"""The tensors of a batch, whatever holds them: also what torch's trees take for one thing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["change_tensors", "tensors_of"]

_DEPTH = 4
_WHOLE = (str, bytes, int, float, complex, type(None))


def change_tensors(change: Callable[[Tensor], Any], batch: Any, *, depth: int = _DEPTH) -> Any:
    """Return a batch of the same kind with each of its tensors changed.

    Lists, tuples, mappings of any kind (a `BatchFeature` of transformers), dataclasses and the
    attributes of other objects are looked into; arrays of numbers count as tensors. Anything else
    stays.

    Args:
        depth: How far objects inside of objects are followed.
    """

    def each(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, np.ndarray):
            return _of_array(change, leaf)
        if not depth or isinstance(leaf, _WHOLE) or callable(leaf):
            return leaf
        if isinstance(leaf, Mapping):
            made: Any = type(leaf)
            return made({k: change_tensors(change, v, depth=depth - 1) for k, v in leaf.items()})
        own = getattr(leaf, "__dict__", {})
        parts = {k: change_tensors(change, v, depth=depth - 1) for k, v in own.items()}
        if all(parts[k] is v for k, v in own.items()):
            return leaf
        twin = copy.copy(leaf)
        for name, value in parts.items():
            object.__setattr__(twin, name, value)  # also of a frozen dataclass
        return twin

    return tree_map(each, batch)


def _of_array(change: Callable[[Tensor], Any], array: NDArray[Any]) -> Any:
    if array.dtype.kind not in "fib" and array.dtype != np.uint8:
        return array
    changed = change(torch.from_numpy(np.array(array)))
    return changed.numpy() if isinstance(changed, Tensor) else changed


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    change_tensors(note, batch)
    return found
