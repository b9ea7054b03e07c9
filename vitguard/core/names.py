"""State dicts and arrays that others hand in, as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vitguard.errors import expected

__all__ = ["tensors_by_name"]


def tensors_by_name(given: object) -> dict[str, Tensor]:
    """Return tensors by name, NumPy arrays and scalars of numbers taken in as tensors.

    Raises:
        InputError: It is no mapping from names, or holds something else.
    """
    if not isinstance(given, Mapping):
        raise expected(
            "tensors by name, such as a state dict", type(given).__name__,
            "Pair a list with its names: dict(zip(names, arrays, strict=True)).",
        )  # fmt: skip
    return {_name(name): _taken(name, value) for name, value in given.items()}


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise expected("names that are text", repr(name)[:80])
    return name


def _taken(name: object, value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray | np.generic):
        raise expected(
            f"a tensor or NumPy array for {name}", type(value).__name__,
            "torch.as_tensor makes one of most things.",
        )  # fmt: skip
    # a copy in the machine's byte order: the caller's array may be read-only, or change later
    array = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise expected(f"numbers that torch knows for {name}", array.dtype) from error
