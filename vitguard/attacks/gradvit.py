"""GradViT: layer norms, patch prior, registration, a switch from gradients to image priors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vitguard.attacks.matching.attack import MatchingAttack
from vitguard.attacks.matching.distances import LayerNorms
from vitguard.attacks.matching.priors import (
    GroupConsistency,
    PatchBorders,
    PixelNorm,
    Prior,
    TotalVariation,
)
from vitguard.attacks.matching.restart import Recipe, Schedule
from vitguard.core import View
from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["GradViT"]


@dataclass(frozen=True)
class GradViT(MatchingAttack):
    """Σ_layers ‖g'_l - g_l‖₂, halved after half the run when the feature statistics come in.

    Args:
        gradient: Weight of the distance in the first half; half of it in the second.
        features: Weight of the feature statistics in the second half.
        patch: Weight of the jumps across patch borders.
        registration: Weight of the distance to the registered mean of the restarts, from a third
            of the run on; needs `restarts` above 1.
        total_variation, pixel_norm: Weights of the image priors.
        rate: Adam's step size in model-input units, cosine decay.
        network: The adversary's pretrained CNN, for the feature statistics; None leaves them out,
            and the guess says so.

    References:
        Hatamizadeh et al., arXiv 2203.11894, equations 1 to 9; 120,000 iterations.
    """

    name: ClassVar[str] = "gradvit"

    iterations: int = 120_000
    restarts: int = 4
    gradient: float = 4e-3
    features: float = 0.2
    patch: float = 1e-4
    registration: float = 1e-2
    total_variation: float = 1e-4
    pixel_norm: float = 1e-4
    rate: float = 0.1
    network: Prior | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("gradient", "features", "patch", "registration", "total_variation", "pixel_norm")
        weights = {k: getattr(self, k) for k in names}
        if not all(w >= 0 for w in weights.values()):
            raise expected("weights of at least 0", weights)

    @classmethod
    def fast(cls, **changes: Any) -> GradViT:
        """Return a preset for a CPU: 400 iterations of 2 restarts, a stronger total variation."""
        preset = {"iterations": 400, "restarts": 2, "total_variation": 2e-3}
        return cls._preset(preset, changes)

    def recipe(self, view: View, anatomy: Anatomy) -> Recipe:
        """See `MatchingAttack`."""
        priors: list[tuple[str, Prior, Schedule]] = [
            ("patch borders", PatchBorders(), ((0.0, self.patch),)),
            ("total variation", TotalVariation("norm"), ((0.0, self.total_variation),)),
            ("pixel norm", PixelNorm(), ((0.0, self.pixel_norm),)),
        ]
        dropped = []
        if self.network is not None:
            priors.append(("feature statistics", self.network, ((0.5, self.features),)))
        else:
            dropped.append("feature statistics: no pretrained CNN was given")
        if self.restarts > 1:
            priors.append(("registration", GroupConsistency(), ((1 / 3, self.registration),)))
        else:
            dropped.append("registration: one restart")
        return Recipe(
            distance=LayerNorms(),
            weight=((0.0, self.gradient), (0.5, self.gradient / 2)),
            priors=tuple(priors),
            rate=self.rate,
            decay="cosine",
            dropped=tuple(dropped),
        )
