"""Numbers as others hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["plain_number"]


def plain_number(value: Any) -> Any:
    """Return Python's own number of a tensor or array of just one; anything else as it is."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.shape in ((), (1,)):
        return value.item()
    return value
