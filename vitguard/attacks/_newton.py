"""Levenberg-Marquardt on the MLP's span: which members of an affine family are true tokens.

With l = norm2(h), h and s affine in v, the pre-activation is u(v) = (p0 + P v) / s(v) + q where
p0, P are W1 gamma2 C applied to the family and q = W1 beta2 + b1. A true token solves

    (I - V V^T) [act(u(v)); 1] = 0    and    mean((C h / s)^2) + eps / s^2 = 1,

V the span of fc2's inputs (docs/methods.md 2.4b). The normal matrix needs no projection matrix:
K^T K - (V^T K)^T (V^T K), K = d act(u) / d v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks._family import Family, Solver
from vitguard.attacks._linear import solve_positive
from vitguard.attacks._mlp import Mlp

__all__ = ["Problem", "Solutions"]

_OUTER_BYTES = 3e8
_NORM_WEIGHT = 0.01  # of the norm equation against the hidden equations, per hidden unit


@dataclass(frozen=True)
class Solutions:
    """Where the iteration ended, per start.

    Args:
        v: Coordinates in the family, shape (starts, k).
        residual: |(I - V V^T) a| / |a|: about the gradient's precision at true tokens.
    """

    v: Float[Tensor, "starts k"]
    residual: Float[Tensor, " starts"]


@dataclass(frozen=True)
class Problem:
    """The equations of one family; build with `Problem.of`."""

    mlp: Mlp
    index: int
    family: Family
    stream: Tensor
    centred: Tensor
    hidden: Tensor
    hidden_origin: Tensor
    shift: Tensor
    outer: Tensor | None

    @staticmethod
    def of(mlp: Mlp, solver: Solver, family: Family, dtype: torch.dtype = torch.float64) -> Problem:
        """Push the family through the norm's scale and fc1 once for all starts."""
        index = solver.scale_index
        centre = solver.stream - solver.stream.mean(0)
        offset = solver.offset - solver.offset.mean(1, keepdim=True)
        origin = family.origin[:, :index] @ centre.T + offset
        directions = centre @ family.directions[:index]
        weight = mlp.weight * mlp.norm.scale
        hidden = (weight @ directions).to(dtype)
        row, column = torch.triu_indices(hidden.shape[1], hidden.shape[1], device=hidden.device)
        small = len(hidden) * len(row) * hidden.element_size() < _OUTER_BYTES
        return Problem(
            mlp=mlp.to(dtype), index=index, family=family.to(dtype), stream=directions.to(dtype),
            centred=origin.to(dtype), hidden=hidden, hidden_origin=(origin @ weight.T).to(dtype),
            shift=(mlp.weight @ mlp.norm.shift + mlp.bias).to(dtype),
            outer=hidden[:, row] * hidden[:, column] if small else None,
        )  # fmt: skip

    def solve(
        self, positions: Tensor, start: Float[Tensor, "starts k"], *, iterations: int = 30
    ) -> Solutions:
        """Run damped Gauss-Newton steps from every start at its position, in chunks."""
        hidden, k = self.hidden.shape
        chunk = max(1, int(5e6 / (hidden * max(k, 1))))
        pieces = zip(positions.split(chunk), start.split(chunk), strict=True)
        parts = [self._solve(p, v, iterations) for p, v in pieces]
        return Solutions(torch.cat([p.v for p in parts]), torch.cat([p.residual for p in parts]))

    def _solve(self, positions: Tensor, v: Tensor, iterations: int) -> Solutions:
        v, residual = v.clone(), v.new_full((len(v),), torch.inf)
        alive = torch.arange(len(v), device=v.device)
        state = self._evaluate(positions, v)
        damping = v.new_full((len(v),), 0.1)
        mark = state.cost
        for step in range(iterations):
            move = self._step(state, damping)
            trial = self._evaluate(state.positions, state.v - move)
            better = trial.cost < state.cost
            state = state.where(better, trial)
            damping = torch.where(better, damping * 0.3, damping * 4).clamp(1e-12, 1e8)
            if step % 4 == 3:  # drop what has converged
                moving = state.cost < 0.98 * mark
                v[alive], residual[alive] = state.v, state.residual
                alive, damping, state = alive[moving], damping[moving], state.pick(moving)
                mark = state.cost
                if not len(alive):
                    break
        v[alive], residual[alive] = state.v, state.residual
        return Solutions(v, residual)

    def _evaluate(self, positions: Tensor, v: Tensor) -> _State:
        index, family = self.index, self.family
        s = family.origin[positions, index] + v @ family.directions[index]
        u = (self.hidden_origin[positions] + v @ self.hidden.T) / s[:, None]
        outside, size = self.mlp.misfit(u + self.shift)
        normal = (self.centred[positions] + v @ self.stream.T) / s[:, None]
        excess = normal.square().mean(1) + self.mlp.norm.epsilon / s.square() - 1
        cost = outside.square().sum(1) + _NORM_WEIGHT * u.shape[1] * excess.square()
        cost = torch.where((s > 1e-6) & cost.isfinite(), cost, torch.inf)
        return _State(positions, v, s, u, outside, normal, excess, outside.norm(dim=1) / size, cost)

    def _step(self, state: _State, damping: Tensor) -> Tensor:
        """Solve the damped normal equations, J = diag(g / s) (P - u s_v^T) with slopes g."""
        s, along = state.s, self.family.directions[self.index]
        slope = self.mlp.activation.slope(state.u + self.shift) / s[:, None]
        lean = slope * state.u
        spread = slope.T[:, :, None] * self.hidden[:, None]  # hidden, starts, k
        span = self.mlp.span[:-1]
        inside = (span.T @ spread.flatten(1)).unflatten(1, spread.shape[1:]).transpose(0, 1)
        inside = inside - (lean @ span)[:, :, None] * along
        cross = ((slope * lean) @ self.hidden)[:, :, None] * along
        power = lean.square().sum(1)[:, None, None] * along[:, None] * along
        normal = self._gram(slope, spread) - cross - cross.mT + power - inside.mT @ inside
        outside = state.outside[:, :-1]
        right = (slope * outside) @ self.hidden - (lean * outside).sum(1)[:, None] * along
        excess = self._excess(state, along)
        weight = _NORM_WEIGHT * state.u.shape[1]
        normal = normal + weight * excess[:, :, None] * excess[:, None, :]
        right = right + weight * state.excess[:, None] * excess
        diagonal = normal.diagonal(dim1=1, dim2=2)
        floor = diagonal + _floor(normal) * diagonal.amax(1, keepdim=True)
        normal = normal + torch.diag_embed(damping[:, None] * floor)
        return solve_positive(normal, right)

    def _gram(self, slope: Tensor, spread: Tensor) -> Tensor:
        """P^T diag(slope^2) P for every start; as one product where the outer products fit."""
        k = self.hidden.shape[1]
        if self.outer is None:
            return torch.einsum("hsi,hsj->sij", spread, spread)
        row, column = torch.triu_indices(k, k, device=slope.device)
        half = slope.square() @ self.outer
        gram = half.new_empty(len(half), k, k)
        gram[:, row, column] = half
        gram[:, column, row] = half
        return gram

    def _excess(self, state: _State, along: Tensor) -> Tensor:
        """Derivative of mean((C h / s)^2) + eps / s^2."""
        s, width = state.s, state.normal.shape[1]
        power = 2 * state.normal.square().mean(1) / s + 2 * self.mlp.norm.epsilon / s**3
        return 2 / width * (state.normal / s[:, None]) @ self.stream - power[:, None] * along


def _floor(values: Tensor) -> float:
    return 1e-12 if values.dtype == torch.float64 else 1e-6


@dataclass(frozen=True)
class _State:
    positions: Tensor
    v: Tensor
    s: Tensor
    u: Tensor
    outside: Tensor
    normal: Tensor
    excess: Tensor
    residual: Tensor
    cost: Tensor

    def _all(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def pick(self, rows: Tensor) -> _State:
        return _State(*(t[rows] for t in self._all()))

    def where(self, better: Tensor, other: _State) -> _State:
        pairs = zip(self._all(), other._all(), strict=True)
        return _State(
            *(torch.where(better.reshape(-1, *[1] * (a.dim() - 1)), b, a) for a, b in pairs)
        )
