"""The equations of the tokens that are not yet known, and what they leave free at each position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.attacks.equations.family import Family, Frame, Solver
from vitguard.attacks.equations.mlp import Mlp
from vitguard.attacks.gelu_span.newton import Problem
from vitguard.core import View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = ["Remainder"]

_UNITS = (4, 200)  # equations of a far search for each unknown, and besides
_SURE = 1.4  # equations for each unknown without which a fit proves nothing


@dataclass(frozen=True)
class Remainder:
    """An affine family of tokens at each position, and the MLP's equations on it.

    Args:
        solver: The linear equations.
        family: Tokens y = origin_i + directions v that fulfil the well determined ones.
        quick: The MLP's equations for far searches, in float32 and on some of the hidden units.
        fine: The same to the end, in float64: directions that the linear equations determine only
            weakly are free as well, and left to the MLP.
        inverse: From a patch's distance to the origin's to coordinates v.
    """

    solver: Solver
    family: Family
    quick: Problem
    fine: Problem
    inverse: Float[Tensor, "k pixels"]

    @staticmethod
    def of(
        frame: Frame,
        view: View,
        anatomy: Anatomy,
        tokens: int,
        left: Int[Tensor, " positions"] | None,
        generator: torch.Generator,
    ) -> Remainder:
        """Set up what a view of so many tokens says, `left` of them at each position if known.

        Raises:
            NotApplicable: The spans are full, there are too few equations to prove anything, or the
                block is not of this form.
            Blocked: The gradient of fc1, fc2 or the attention projection cannot be read.
        """
        mlp = Mlp.of(view, anatomy, anatomy.blocks[0], tokens)
        solver = Solver.of(frame, view, tokens, left)
        most = len(solver.values) - 1
        k = min(max(solver.free(1e-2), 2), most)
        family = solver.family(k)
        last = min(solver.free(3e-2) + 20, most)
        equations = len(mlp.weight) + int(mlp.augmented) - tokens
        if equations < _SURE * last:
            raise NotApplicable(
                f"the MLP's {max(equations, 0)} equations for {last} unknowns cannot prove a token"
            )
        few = mlp.some(tokens + _UNITS[0] * k + _UNITS[1], generator)
        moved = solver.patch @ family.directions[: solver.patch.shape[1]]
        charge(svd=moved.numel() * min(moved.shape))
        return Remainder(
            solver=solver,
            family=family,
            quick=Problem.of(few, solver, family, torch.float32),
            fine=Problem.of(mlp, solver, solver.family(last)),
            inverse=torch.linalg.pinv(moved, rtol=1e-3),
        )

    @property
    def free(self) -> int:
        """Directions that the linear equations leave free."""
        return len(self.inverse)

    @property
    def hidden(self) -> int:
        """Hidden units that a far search asks."""
        return len(self.quick.hidden)

    @property
    def basis(self) -> Float[Tensor, "pixels directions"]:
        """Orthonormal directions in which the patches of the family move."""
        moved = self.solver.patch @ self.family.directions[: self.solver.patch.shape[1]]
        charge(svd=moved.numel() * min(moved.shape))
        left, values, _ = torch.linalg.svd(moved, full_matrices=False)
        return left[:, values > 1e-6 * values[0]]

    def base(self, position: int) -> Float[Tensor, "one pixels"]:
        """Return the minimum-norm patch at a position."""
        return self.solver.pixels(self.family.origin[position : position + 1])

    def project(self, position: int, patches: Float[Tensor, "n pixels"]) -> Float[Tensor, "n k"]:
        """Coordinates of the members whose patches come nearest."""
        return (patches - self.base(position)) @ self.inverse.T

    def expected(self, position: int) -> Float[Tensor, "one width"]:
        """Return what the minimum-norm member of a position attends to."""
        return self.solver.values_attended(self.family.origin[position : position + 1])
