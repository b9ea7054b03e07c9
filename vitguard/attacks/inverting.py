"""Inverting Gradients: cosine distance, total variation, Adam on signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vitguard.attacks.matching.attack import MatchingAttack
from vitguard.attacks.matching.distances import Cosine
from vitguard.attacks.matching.priors import TotalVariation
from vitguard.attacks.matching.restart import Recipe
from vitguard.core import View
from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["InvertingGradients"]


@dataclass(frozen=True)
class InvertingGradients(MatchingAttack):
    """1 - cosine over all tensors, total variation, Adam 0.1 on the gradient's sign, step decay.

    Args:
        total_variation: Weight of mean |Δrow| + mean |Δcolumn| in model-input units.
        rate: Adam's step size in model-input units.
        decay: `step` (the paper's, to a tenth at 3/8, 5/8 and 7/8), `cosine` or `none`.

    References:
        Geiping et al., arXiv 2003.14053, equation 4; 24,000 iterations.
    """

    name: ClassVar[str] = "inverting"

    iterations: int = 24_000
    total_variation: float = 0.2
    rate: float = 0.1
    decay: Literal["step", "cosine", "none"] = "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.total_variation >= 0:
            raise expected("total_variation of at least 0", self.total_variation)
        if self.decay not in ("step", "cosine", "none"):
            raise expected("decay step, cosine or none", repr(self.decay))

    @classmethod
    def fast(cls, **changes: Any) -> InvertingGradients:
        """Return a preset for a CPU: 200 iterations, cosine decay, half the total variation."""
        return cls._preset({"iterations": 200, "decay": "cosine", "total_variation": 0.1}, changes)

    def recipe(self, view: View, anatomy: Anatomy) -> Recipe:
        """See `MatchingAttack`."""
        return Recipe(
            distance=Cosine(),
            priors=(("total variation", TotalVariation(), ((0.0, self.total_variation),)),),
            rate=self.rate,
            decay=self.decay,
            signed=True,
        )
