"""What a watcher of a matching attack is told while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Progress"]


@dataclass(frozen=True, eq=False)
class Progress:
    """What a watcher of a running attack is told.

    Args:
        attack: Name of the attack.
        iteration, iterations: Done and planned.
        terms: Weighted loss terms of the best restart, and the step size as `rate`.
        estimate: Function that gives the current images as pixels in [0, 1] when asked.
        seconds: Since the start of this process's part of the run.
        settings: The attack's settings.
    """

    attack: str
    iteration: int
    iterations: int
    terms: dict[str, float]
    estimate: Callable[[], Tensor]
    seconds: float
    settings: dict[str, Any]
