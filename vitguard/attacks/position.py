"""Position inversion: learnable positions give the image back exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.equations.grid import ON_GRID, ROUNDED, nearest_levels
from vitguard.attacks.equations.rows import (
    LeastSquares,
    guess_from_patches,
    least_squares,
    patch_gradient,
    position_gradient,
)
from vitguard.attacks.labels import try_labels
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy

__all__ = ["PositionInversion"]

_AS_WELL = 2.0  # how much more than expected a true image may leave


@dataclass(frozen=True)
class PositionInversion(Attack):
    """Solve G^T X = dL/dW for the patches X.

    Learnable absolute positions leak G_i = dL/de_i = dL/dz_i, and the patch embedding leaks
    dL/dW = sum_i G_i x_i^T. At batch size 1 this is a linear system for all patches at once; it is
    solved by least squares in float64, unique where rank(G) = N <= D and minimum norm otherwise.
    No assumption on attention, norms or depth. Pixels that come near the grid of 8-bit image files
    are set to it where the system, of true gradients, holds as well with them. In a batch the
    solution is a mixture in which one dominant image may still stand out. Positions that a shuffle
    replaced get no gradient: their rows of zeros in G tell its mask (in a batch, the positions
    replaced in every image).

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
        one = plain.batch_size == 1
        exact = one and a.patches <= a.width
        found = plain.verdict(
            self.name,
            (a.positions, a.patch_weight),
            "; ".join(a.obstacles),
            "both gradients are plain: G^T X = dL/dW gives the image back by least squares"
            + (", exactly" if exact else ", in minimum norm"),
        )
        if not one and found.possible:
            why = (
                f"not exactly (both gradients are plain, but {plain.batch_size} images share each "
                "position's), unless one image's gradient dominates: that one comes back"
            )
            return (replace(found, reason=why, exact=False),)
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
        positions = position_gradient(summed, anatomy)
        weight = patch_gradient(summed, anatomy)
        system = _System.of(positions.T, weight)
        patches = system.fit.solution
        details = {"rank": system.fit.rank, "patches": anatomy.patches, "residual": system.residual}
        if (exact := _on_grid(view, anatomy, system)) is not None:
            patches, details["grid"] = exact, ROUNDED
        replaced = positions.eq(0).all(dim=1)[None]
        return guess_from_patches(
            view,
            anatomy,
            patches,
            labels=try_labels(view, generator),
            shuffled=None if view.traits.shuffle is None else replaced,
            details=details,
        )


@dataclass(frozen=True)
class _System:
    """The system with its rows weighted, and its least-squares solution."""

    system: Tensor
    fit: LeastSquares
    size: float

    @staticmethod
    def of(system: Tensor, target: Tensor) -> _System:
        """Weight rows by their size, as float rounding is; plainly if it is not.

        Equations outnumber unknowns where N < D, so the residual tells which of the two noise is.
        """
        scale = target.norm(dim=1, keepdim=True)
        rows = 1 / torch.where(scale > 0, scale, torch.ones_like(scale))
        size = float(scale.count_nonzero()) ** 0.5 or 1.0  # of a target whose rows have unit norm
        made = _System(rows * system, least_squares(rows * system, rows * target), size)
        if made.residual < 1e-3:
            return made
        return _System(system, least_squares(system, target), float(scale.norm()) or 1.0)

    @property
    def residual(self) -> float:
        """What the solution leaves, relative to the target."""
        return self.fit.residual / self.size

    def left_by(self, patches: Tensor) -> float:
        """Return what some patches near the solution leave, relative to the target.

        What the solution leaves is orthogonal to the system's columns, so the difference adds to
        it at right angles; single precision will do for that.
        """
        moved = (self.system / self.size).float() @ (patches - self.fit.solution).float()
        return math.hypot(self.residual, float(moved.norm()))


def _on_grid(view: View, anatomy: Anatomy, found: _System) -> Tensor | None:
    """Return the patches of an 8-bit image that explain the update as well as the solution does."""
    if not view.traits.exact or view.traits.sparse:  # zeros that were put there are on the grid too
        return None
    pixels = anatomy.patchify(
        view.normalization.invert(anatomy.unpatchify(found.fit.solution[None]))
    )
    near, away = nearest_levels(pixels[0])
    if not bool((away < ON_GRID).all()):
        return None
    patches = anatomy.patchify(view.normalization.apply(anatomy.unpatchify(near[None])))[0]
    # least squares fits the rounding too: r unknowns take a share r / D of its energy away
    share = max(1 - found.fit.rank / len(found.system), 1 / len(found.system))
    limit = _AS_WELL * found.residual / share**0.5
    return patches if found.left_by(patches) < limit else None
