"""GradInversion: layer norms, image priors, group consistency, Langevin noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vitguard.attacks.matching.attack import MatchingAttack
from vitguard.attacks.matching.distances import LayerNorms
from vitguard.attacks.matching.priors import (
    GroupConsistency,
    PixelNorm,
    Prior,
    TotalVariation,
)
from vitguard.attacks.matching.restart import Recipe, Schedule
from vitguard.core import View
from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["GradInversion"]


@dataclass(frozen=True)
class GradInversion(MatchingAttack):
    """Σ_layers ‖g'_l - g_l‖₂ with fidelity priors and an ensemble that is drawn together.

    Args:
        gradient, total_variation, pixel_norm, features, group: Weights of the terms. Group
            consistency starts after a third of the iterations and needs `restarts` above 1.
        langevin: Noise after each step, as a multiple of the step size.
        rate: Adam's step size in model-input units.
        network: The adversary's pretrained CNN, for the feature statistics; None leaves them out,
            and the guess says so.

    References:
        Yin et al., arXiv 2104.07586, equations 2 to 11; 20,000 iterations.
    """

    name: ClassVar[str] = "gradinversion"

    iterations: int = 20_000
    restarts: int = 4
    gradient: float = 1e-4
    total_variation: float = 1e-4
    pixel_norm: float = 1e-6
    features: float = 0.1
    group: float = 0.01
    langevin: float = 0.2
    rate: float = 0.1
    network: Prior | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = {
            k: getattr(self, k)
            for k in ("gradient", "total_variation", "pixel_norm", "features", "group")
        }
        if not all(w >= 0 for w in weights.values()):
            raise expected("weights of at least 0", weights)

    @classmethod
    def fast(cls, **changes: Any) -> GradInversion:
        """Return a preset for a CPU: 400 iterations of 2 restarts, little noise."""
        return cls._preset({"iterations": 400, "restarts": 2, "langevin": 0.01}, changes)

    def recipe(self, view: View, anatomy: Anatomy) -> Recipe:
        """See `MatchingAttack`."""
        priors: list[tuple[str, Prior, Schedule]] = [
            ("total variation", TotalVariation("norm"), ((0.0, self.total_variation),)),
            ("pixel norm", PixelNorm(), ((0.0, self.pixel_norm),)),
        ]
        dropped = []
        if self.network is not None:
            priors.append(("feature statistics", self.network, ((0.0, self.features),)))
        else:
            dropped.append("feature statistics: no pretrained CNN was given")
        if self.restarts > 1:
            priors.append(("group consistency", GroupConsistency(), ((1 / 3, self.group),)))
        else:
            dropped.append("group consistency: one restart")
        return Recipe(
            distance=LayerNorms(),
            weight=((0.0, self.gradient),),
            priors=tuple(priors),
            rate=self.rate,
            decay="cosine",
            langevin=self.langevin,
            dropped=tuple(dropped),
        )
