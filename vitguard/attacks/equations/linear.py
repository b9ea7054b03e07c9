"""Linear systems, by Cholesky and conjugate gradients; the update linearised at an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import ENDLESS, Budget, charge, worked
from vitguard.attacks.equations.update_jacobian import UpdateJacobian
from vitguard.core import View
from vitguard.vit import Anatomy

__all__ = ["WholeUpdate", "conjugate_gradients", "least_squares", "solve_positive"]

_SKETCH = 30  # equations kept per unknown: the preconditioner is then within a factor 1.5


def solve_positive(
    matrices: Float[Tensor, "batch k k"], right: Float[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """Solve symmetric positive definite systems; 0 where a matrix is not.

    By Cholesky: twice as fast as LU, and the batched LU of some builds of torch (2.15 with MKL)
    never returns from sizes above 128 on more than one thread.
    """
    roots, failed = torch.linalg.cholesky_ex(matrices)
    solved = torch.cholesky_solve(right[..., None], roots)[..., 0]
    fine = (failed == 0)[:, None] & solved.isfinite()
    return torch.where(fine, solved, torch.zeros_like(solved))


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor] = lambda r: r,
    *,
    iterations: int = 150,
    tolerance: float = 1e-7,
    budget: Budget = ENDLESS,
) -> Tensor:
    """Solve operator(x) = right for a symmetric operator without negative directions.

    It starts at x = 0.

    Args:
        tolerance: Relative norm of the (preconditioned) residual at which to stop.
        budget: Once it is spent the first iteration is the last: nearer than nothing, and no step
            of a wide model takes half a minute of a budget of seconds.
    """
    x, r = torch.zeros_like(right), right.clone()
    z = precondition(r)
    p, power = z.clone(), (r * z).sum()
    goal = tolerance**2 * power
    for _ in range(iterations):
        if not bool(power > goal):
            break
        q = operator(p)
        step = power / (p * q).sum()
        x, r = x + step * p, r - step * q
        z = precondition(r)
        new = (r * z).sum()
        p, power = z + (new / power) * p, new
        charge(elements=0.5 * right.numel(), calls=12)
        if budget.over:
            break
    return x


def least_squares(
    forth: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
    rest: Tensor,
    *,
    iterations: int,
    budget: Budget = ENDLESS,
    enough: float = 1e-5,
) -> Tensor:
    """Return u that minimises |forth(u) - rest|: conjugate gradients on the normal equations.

    Args:
        forth, back: A linear map and its adjoint.
        enough: Size of the gradient, relative to the first one, at which to stop.
    """
    slope = back(rest)
    power = first = slope.square().sum()
    along, u = slope, torch.zeros_like(slope)
    for _ in range(iterations):
        if budget.over or not float(power) > enough**2 * float(first):
            break
        image = forth(along)
        length = power / image.square().sum()
        u, rest = u + length * along, rest - length * image
        slope = back(rest)
        power, before = slope.square().sum(), power
        along = slope + power / before * along
        charge(elements=0.5 * (u.numel() + rest.numel()), calls=10)
    return u


@dataclass(eq=False)
class WholeUpdate:
    """All tensors of the update, each at unit size, as a linear map of some patches at an image.

    Args:
        view: What is attacked.
        slope: The derivative of the update at the image.
        rest: What is seen minus what it would make, one vector.
        scales: 1 / root mean square of each tensor.
        free: Indices of the patches that may move.
    """

    view: View
    anatomy: Anatomy
    slope: UpdateJacobian
    rest: Tensor
    scales: list[Tensor]
    free: Tensor

    @staticmethod
    def at(view: View, patches: Float[Tensor, "patches pixels"], label: Tensor, free: Tensor):
        """Linearise at `patches` (model-input units) for the patches where `free` is true."""
        anatomy = Anatomy.of(view.model)
        names = [name for name, tensor in view.update.tensors.items() if bool(tensor.any())]
        slope = UpdateJacobian.at(
            view, anatomy.unpatchify(patches[None]), names,
            lambda inputs: dict(view.simulate(inputs, label, None).tensors),
        )  # fmt: skip
        seen = [view.update.tensors[name].detach().to(slope.inputs) for name in slope.names]
        scales = [1 / t.square().mean().sqrt() for t in seen]
        rest = [(s * (t - m)).flatten() for s, t, m in zip(scales, seen, slope.made, strict=True)]
        return WholeUpdate(view, anatomy, slope, torch.cat(rest), scales, torch.nonzero(free)[:, 0])

    def forth(self, v: Float[Tensor, "free pixels"]) -> Tensor:
        """Return J v."""
        across = v.new_zeros(1, self.anatomy.patches, self.anatomy.patch_pixels)
        across[0, self.free] = v
        moved = self.slope.forth(self.anatomy.unpatchify(across))
        return torch.cat([(s * m).flatten() for s, m in zip(self.scales, moved, strict=True)])

    def back(self, u: Tensor) -> Float[Tensor, "free pixels"]:
        """Return J^T u."""
        made = self.slope.made
        parts = u.split([m.numel() for m in made])
        weights = [s * p.view_as(m) for s, p, m in zip(self.scales, parts, made, strict=True)]
        return self.anatomy.patchify(self.slope.back(weights))[0, self.free]

    def step(self, budget: Budget, generator: torch.Generator, iterations: int = 300) -> Tensor:
        """Return the change of the free patches that explains the rest, in float64.

        Where a column of J for each unknown can be had in 0.7 of the budget, the QR factor of a
        sketch of its rows preconditions (Rokhlin and Tygert 2008), and few iterations are enough.
        """
        size = (len(self.free), self.anatomy.patch_pixels)
        root = self._root(size, budget.part(0.7), generator)
        shape = (-1,) if root is not None else size

        def up(u: Tensor) -> Tensor:
            if root is None:
                return u
            return torch.linalg.solve_triangular(root, u[:, None], upper=True).view(size)

        def down(v: Tensor) -> Tensor:
            if root is None:
                return v
            return torch.linalg.solve_triangular(root.T, v.reshape(-1, 1), upper=False)[:, 0]

        u = least_squares(
            lambda u: self.forth(up(u)), lambda r: down(self.back(r)), self.rest,
            iterations=iterations, budget=budget,
        )  # fmt: skip
        return up(u.reshape(shape)).double()

    def _root(
        self, size: tuple[int, int], budget: Budget, generator: torch.Generator
    ) -> Tensor | None:
        """Return R of J = Q R from a random part of the rows; None where that takes too much."""
        unknowns = size[0] * size[1]
        kept = [
            torch.randint(
                m.numel(), (min(m.numel(), _SKETCH * unknowns // 8),), generator=generator
            )
            for m in self.slope.made
        ]
        gains = [(m.numel() / len(k)) ** 0.5 for m, k in zip(self.slope.made, kept, strict=True)]
        starts = torch.tensor([0] + [m.numel() for m in self.slope.made]).cumsum(0)
        rows = torch.cat([k + s for k, s in zip(kept, starts, strict=False)]).to(self.rest.device)
        gain = torch.cat([torch.full((len(k),), g) for k, g in zip(kept, gains, strict=True)])
        gain, columns = gain.to(self.rest), []
        before = worked()
        for index in range(unknowns):
            v = self.rest.new_zeros(unknowns)
            v[index] = 1
            columns.append(gain * self.forth(v.view(size))[rows])
            each = 1e-9 * (worked() - before) / (index + 1)
            if each * (unknowns - index - 1) > budget.left:
                return None
        charge(qr=len(columns[0]) * unknowns**2)
        factor = torch.linalg.qr(torch.stack(columns, 1).double(), mode="r").R
        lift = 1e-7 * factor.diagonal().abs().amax()
        factor = factor + lift * torch.eye(unknowns).to(factor)
        return factor.to(self.rest)
