"""Inverting Gradients: cosine distance, total variation, Adam on signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vitguard.attacks._distances import Cosine
from vitguard.attacks._matching import MatchingAttack
from vitguard.attacks._priors import TotalVariation
from vitguard.attacks._restart import Recipe
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

    References:
        Geiping et al., arXiv 2003.14053, equation 4; 24,000 iterations.
    """

    name: ClassVar[str] = "inverting"

    iterations: int = 24_000
    total_variation: float = 0.2
    rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.total_variation >= 0:
            raise expected("total_variation of at least 0", self.total_variation)

    @classmethod
    def fast(cls, **changes: Any) -> InvertingGradients:
        """Return a preset for a CPU: 200 iterations."""
        return cls(**{"iterations": 200, **changes})

    def recipe(self, view: View, anatomy: Anatomy) -> Recipe:
        """See `MatchingAttack`."""
        return Recipe(
            distance=Cosine(),
            priors=(("total variation", TotalVariation(), ((0.0, self.total_variation),)),),
            rate=self.rate,
            decay="step",
            signed=True,
        )
