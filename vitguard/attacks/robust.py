"""Robust forms of `position` and `span`: an image prior, its weight chosen without the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitguard.attacks._base import Attack
from vitguard.attacks._check import mismatch, require_finite
from vitguard.attacks._robust import position_problem, span_problem
from vitguard.attacks._spans import guess_from_patches
from vitguard.attacks.labels import try_labels
from vitguard.core import Guess, View
from vitguard.errors import NotApplicable, expected
from vitguard.vit import Anatomy

__all__ = ["RobustPosition", "RobustSpan"]

_WEIGHTS = (1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_SOFTNESS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class RobustPosition(Attack):
    """`position` with a smoothness prior, for noisy, rounded or pruned gradients.

    The weight of the prior is the one whose image explains the update best: the adversary simulates
    the update of every candidate and compares (`mismatch`). Where nothing can be simulated the
    middle weight is taken.

    Args:
        seconds: Time budget for the candidates.

    Raises:
        NotApplicable: No plain embedding or no positions.
        Blocked: The position or patch gradient is not in the update.

    References:
        docs/methods.md 2.5c.
    """

    name: ClassVar[str] = "position-robust"
    family: ClassVar[str] = "ladder"
    seconds: float = 20.0

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise expected("seconds above 0", self.seconds)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return the image whose simulated update is nearest."""
        anatomy = Anatomy.of(view.model)
        anatomy.require_plain_embedding()
        if anatomy.positions is None:
            raise NotApplicable("the model has no absolute position embedding")
        summed = view.gradient(steps=True)
        require_finite(summed)
        solve = position_problem(summed, anatomy)
        candidates = (({"weight": w}, lambda w=w: solve(w)) for w in _WEIGHTS)
        return _choose(view, anatomy, generator, candidates, self.seconds)


@dataclass(frozen=True)
class RobustSpan(Attack):
    """`span` with soft directions and a smoothness prior, for gradients that are not exact.

    Softness and weight are chosen as in `RobustPosition`.

    Args:
        seconds: Time budget for the candidates.

    Raises:
        NotApplicable: No plain embedding, no positions, or no pre-norm first block.
        Blocked: The gradient of query, key and value is not in the update.

    References:
        docs/methods.md 2.5c.
    """

    name: ClassVar[str] = "span-robust"
    family: ClassVar[str] = "ladder"
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise expected("seconds above 0", self.seconds)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return the image whose simulated update is nearest."""
        anatomy = Anatomy.of(view.model)
        anatomy.require_plain_embedding()
        if anatomy.positions is None or not anatomy.blocks[0].pre_norm:
            raise NotApplicable("needs absolute positions and a first norm before the attention")
        summed = view.gradient(steps=True)
        require_finite(summed)
        solve = span_problem(summed, anatomy)
        candidates = (
            ({"softness": s, "weight": w}, lambda s=s, w=w: solve(s, w))
            for w in (1e-3, 1e-5, 1e-2, 1e-7, 1e-9)
            for s in _SOFTNESS
        )
        return _choose(view, anatomy, generator, candidates, self.seconds)


def _choose(
    view: View,
    anatomy: Anatomy,
    generator: torch.Generator,
    candidates: Iterable[tuple[dict[str, Any], Callable[[], Tensor]]],
    seconds: float,
) -> Guess:
    """Solve every candidate in time and return the guess with the smallest mismatch."""
    labels = try_labels(view, generator)
    deadline = time.monotonic() + seconds
    best: Guess | None = None
    least = float("inf")
    for settings, solve in candidates:
        patches = solve()
        if not bool(patches.isfinite().all()):
            continue
        guess = guess_from_patches(view, anatomy, patches, labels=labels, details=settings)
        distance = mismatch(view, guess)
        score = 2.0 if distance is None else distance
        if best is None or score < least:
            details = {**settings, "mismatch": distance, "chosen": "by the simulated update"}
            best = guess_from_patches(view, anatomy, patches, labels=labels, details=details)
            least = score
        if time.monotonic() > deadline:
            break
    if best is None:
        raise NotApplicable("the update is not finite, and so is its solution")
    return best
