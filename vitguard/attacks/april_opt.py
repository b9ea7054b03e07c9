"""APRIL's optimization attack: squared distance, and the direction of the position gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vitguard.attacks.matching.attack import MatchingAttack
from vitguard.attacks.matching.distances import Cosine, Distance, SquaredError, Weighted
from vitguard.attacks.matching.priors import TotalVariation
from vitguard.attacks.matching.restart import Recipe
from vitguard.core import View
from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["AprilMatching"]


@dataclass(frozen=True)
class AprilMatching(MatchingAttack):
    """‖∇w' - ∇w‖² - α cos(∇E_pos', ∇E_pos).

    The second term is off, and the guess says so, when the position gradient is not in the update.

    Args:
        alpha: Weight of the position term.
        total_variation: Weight of an optional total variation.
        optimizer, rate: `lbfgs` with a line search, which gets much further here than Adam, or
            `adam` with a step in model-input units (0.1, say) and cosine decay.

    References:
        Lu et al., arXiv 2112.14087, equation 8.
    """

    name: ClassVar[str] = "april-opt"

    iterations: int = 200
    alpha: float = 1.0
    total_variation: float = 0.0
    optimizer: Literal["adam", "lbfgs"] = "lbfgs"
    rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in ("adam", "lbfgs"):
            raise expected("optimizer 'adam' or 'lbfgs'", repr(self.optimizer))
        if not (self.alpha >= 0 and self.total_variation >= 0):
            raise expected(
                "alpha and total_variation of at least 0", (self.alpha, self.total_variation)
            )

    @classmethod
    def fast(cls, **changes: Any) -> AprilMatching:
        """Return a preset for a CPU: 20 iterations in whitened coordinates."""
        return cls._preset({"iterations": 20, "spectrum": 1.0}, changes)

    def recipe(self, view: View, anatomy: Anatomy) -> Recipe:
        """See `MatchingAttack`."""
        positions = anatomy.positions
        chosen = anatomy.select(self.parameters, [*view.update.tensors, *view.update.sealed])
        parts: list[tuple[float, Distance, frozenset[str] | None]] = [(1.0, SquaredError(), None)]
        dropped = ()
        if positions is not None and positions in chosen and view.update.can_read(positions):
            parts.append((self.alpha, Cosine(), frozenset([positions])))
        else:
            dropped = ("position term: the position gradient is not in the update",)
        prior = ("total variation", TotalVariation(), ((0.0, self.total_variation),))
        return Recipe(
            distance=Weighted(tuple(parts)),
            priors=(prior,) if self.total_variation else (),
            optimizer=self.optimizer,
            rate=self.rate,
            decay="cosine" if self.optimizer == "adam" else "none",
            boxed=self.optimizer == "adam",
            line_search=self.optimizer == "lbfgs",
            dropped=dropped,
        )
