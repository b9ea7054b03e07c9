"""Position inversion: learnable positions give the image back exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.equations.rows import guess_from_patches, least_squares, patch_gradient
from vitguard.attacks.labels import try_labels
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy

__all__ = ["PositionInversion"]


@dataclass(frozen=True)
class PositionInversion(Attack):
    """Solve G^T X = dL/dW for the patches X.

    Learnable absolute positions leak G_i = dL/de_i = dL/dz_i, and the patch embedding leaks
    dL/dW = sum_i G_i x_i^T. At batch size 1 this is a linear system for all patches at once; it is
    solved by least squares in float64, unique where rank(G) = N <= D and minimum norm otherwise.
    No assumption on attention, norms or depth. In a batch the solution is a mixture in which one
    dominant image may still stand out. Positions that a shuffle replaced get no gradient: their
    rows of zeros in G tell its mask (in a batch, the positions replaced in every image).

    Raises:
        NotApplicable: No absolute positions, a norm inside the patch embedding, patch dropout,
            overlapping patches.
        Blocked: The position or patch gradient is not in the update.

    References:
        docs/methods.md 2.1.
    """

    name: ClassVar[str] = "position"
    family: ClassVar[str] = "closed-form"
    rung: ClassVar[Rung | None] = Rung(10, 10)

    def remains(self, plain: Released) -> tuple[Remaining, ...]:
        """Possible where the gradients of positions and patches are plain."""
        a = plain.anatomy
        if a.positions is None:
            return (Remaining(self.name, False, (), "no absolute position embedding"),)
        exact = a.patches <= a.width
        found = plain.verdict(
            self.name,
            (a.positions, a.patch_weight),
            "; ".join(a.obstacles),
            "both gradients are plain: G^T X = dL/dW gives the image back by least squares"
            + (", exactly" if exact else ", in minimum norm"),
        )
        return (replace(found, exact=found.possible and exact, near=found.possible),)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return one image; several full-batch local SGD steps are as good as one."""
        anatomy = Anatomy.of(view.model)
        anatomy.require_plain_embedding()
        if anatomy.positions is None:
            raise NotApplicable("the model has no absolute position embedding")
        if view.traits.positions in ("fixed", "none") and not view.update.can_read(
            anatomy.positions
        ):
            raise Blocked(anatomy.positions, "fixed positions have no gradient")
        summed = view.gradient(steps=True)
        positions = summed.read(anatomy.positions)[0, anatomy.position_prefix :]
        if positions.shape[0] != anatomy.patches:
            raise NotApplicable("positions are resampled in the forward pass")
        weight = patch_gradient(summed, anatomy)
        patches, rank, residual = _solve(positions.T, weight)
        details = {"rank": rank, "patches": anatomy.patches, "residual": residual}
        replaced = positions.eq(0).all(dim=1)[None]
        return guess_from_patches(
            view,
            anatomy,
            patches,
            labels=try_labels(view, generator),
            shuffled=None if view.traits.shuffle is None else replaced,
            details=details,
        )


def _solve(system: Tensor, target: Tensor) -> tuple[Tensor, int, float]:
    """Least squares with rows weighted by their size, as float rounding is; plainly if it is not.

    Equations outnumber unknowns where N < D, so the residual tells which of the two noise is.
    """
    scale = target.norm(dim=1, keepdim=True)
    weight = 1 / torch.where(scale > 0, scale, torch.ones_like(scale))
    for rows in (weight, torch.ones_like(weight)):
        solution, rank = least_squares(rows * system, rows * target)
        error = rows * (system @ solution - target)
        residual = float(error.norm() / (rows * target).norm().clamp_min(1e-300))
        if residual < 1e-3:
            break
    return solution, rank, residual
