"""Levenberg-Marquardt on the MLP's span: which members of an affine family are true tokens.

With l = norm2(h), h and s affine in v, the pre-activation is u(v) = (p0 + P v) / s(v) + q where
p0, P are W1 gamma2 C applied to the family and q = W1 beta2 + b1. A true token solves

    (I - V V^T) [act(u(v)); 1] = 0    and    mean((C h / s)^2) + eps / s^2 = 1,

V the span of fc2's inputs (docs/methods.md 2.4b). The normal matrix needs no projection matrix:
K^T K - (V^T K)^T (V^T K), K = d act(u) / d v.

A start may be pulled toward attended values: the tokens of one image attend to the same values, so
theirs are alike, and a search near those of image b ends at a token of image b. The pull fades and
is off in the last iterations, so it chooses a solution and does not move it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import ENDLESS, Budget, charge
from vitguard.attacks.equations.family import Family, Solver
from vitguard.attacks.equations.linear import solve_positive
from vitguard.attacks.equations.mlp import Mlp

__all__ = ["Problem", "Pull", "Solutions"]

_OUTER_BYTES = 3e8
_NORM_WEIGHT = 0.01  # of the norm equation against the hidden equations, per hidden unit
_UNNORMED = 0.1  # of what the norm's equation misses: at true tokens it is as small as the rest
_FADE, _RELEASED = 0.7, 8  # of a pull at each iteration; iterations without it at the end


@dataclass(frozen=True)
class Solutions:
    """Where the iteration ended, per start.

    Args:
        v: Coordinates in the family, shape (starts, k).
        residual: |(I - V V^T) a| / |a|: about the gradient's precision at true tokens; no less than
            a share of what the equation of the norm misses. Without it h = 0 would solve all others
            wherever the span holds act(b), as of a gradient that was cut to a low rank it does.
    """

    v: Float[Tensor, "starts k"]
    residual: Float[Tensor, " starts"]


@dataclass(frozen=True)
class Pull:
    """Where each start is drawn to.

    Args:
        target: Attended values in the coordinates d of the family, shape (starts, attended).
        strength: Of the pull against the equations, both as they are at the start; 0 for none.
    """

    target: Float[Tensor, "starts attended"]
    strength: Float[Tensor, " starts"]


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
    attended: Tensor
    attended_origin: Tensor

    @staticmethod
    def of(mlp: Mlp, solver: Solver, family: Family, dtype: torch.dtype = torch.float64) -> Problem:
        """Push the family through the norm's scale and fc1 once for all starts."""
        index = solver.scale_index
        moved = family.directions.shape[1] + len(family.origin)
        charge(products=2.0 * mlp.weight.numel() * moved)
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
            attended=family.directions[solver.patch.shape[1] : index].to(dtype),
            attended_origin=family.origin[:, solver.patch.shape[1] : index].to(dtype),
        )  # fmt: skip

    def solve(
        self,
        positions: Tensor,
        start: Float[Tensor, "starts k"],
        *,
        iterations: int = 30,
        pull: Pull | None = None,
        budget: Budget = ENDLESS,
    ) -> Solutions:
        """Run damped Gauss-Newton steps from every start at its position, in chunks.

        Once the budget is spent they stay where they are.
        """
        hidden, k = self.hidden.shape
        chunk = max(1, int(5e6 / (hidden * max(k, 1))))
        if pull is None:
            pull = Pull(
                start.new_zeros(len(start), len(self.attended)), start.new_zeros(len(start))
            )
        whole = (positions, start, pull.target.to(start), pull.strength.to(start))
        pieces = zip(*(t.split(chunk) for t in whole), strict=True)
        parts = [self._solve(p, v, Pull(d, w), iterations, budget) for p, v, d, w in pieces]
        return Solutions(torch.cat([p.v for p in parts]), torch.cat([p.residual for p in parts]))

    def _solve(
        self, positions: Tensor, v: Tensor, pull: Pull, iterations: int, budget: Budget
    ) -> Solutions:
        v, residual = v.clone(), v.new_full((len(v),), torch.inf)
        alive = torch.arange(len(v), device=v.device)
        state = self._evaluate(positions, v.clone(), pull.target)  # v is written to below
        damping = v.new_full((len(v),), 0.1)
        weight = pull.strength * state.cost.clamp(max=1e6) / state.apart.clamp_min(1e-12)
        mark = state.cost
        for step in range(iterations):
            if budget.over:
                break
            if step >= iterations - _RELEASED:
                weight = torch.zeros_like(weight)
            self._charge(len(alive))
            move = self._step(state, damping, weight)
            trial = self._evaluate(state.positions, state.v - move, state.target)
            better = trial.cost + weight * trial.apart < state.cost + weight * state.apart
            state = state.where(better, trial)
            damping = torch.where(better, damping * 0.3, damping * 4).clamp(1e-12, 1e8)
            weight = weight * _FADE
            if step % 4 == 3:  # drop what has converged
                moving = (state.cost < 0.98 * mark) | (weight > 0)
                v[alive], residual[alive] = state.v, state.residual
                alive, damping, weight = alive[moving], damping[moving], weight[moving]
                state = state.pick(moving)
                mark = state.cost
                if not len(alive):
                    break
        v[alive], residual[alive] = state.v, state.residual
        return Solutions(v, residual)

    def _charge(self, starts: int) -> None:
        """Count one step: slopes, the normal matrices and their solution, and the new misfits."""
        (hidden, k), tokens = self.hidden.shape, self.mlp.span.shape[1]
        each = 2.0 * hidden * k * tokens + hidden * k * k + 8.0 * hidden * k + 2.0 * tokens * k * k
        each += 4.0 * hidden * tokens + 4.0 * self.stream.numel() + k**3
        share = 1.0 if self.hidden.dtype == torch.float64 else 0.5
        passes = hidden * (6.0 + 0.3 * k) + 2.0 * len(self.stream)
        charge(products=starts * each, elements=starts * passes, calls=90, share=share)

    def _evaluate(self, positions: Tensor, v: Tensor, target: Tensor) -> _State:
        index, family = self.index, self.family
        s = family.origin[positions, index] + v @ family.directions[index]
        u = (self.hidden_origin[positions] + v @ self.hidden.T) / s[:, None]
        outside, size = self.mlp.misfit(u + self.shift)
        normal = (self.centred[positions] + v @ self.stream.T) / s[:, None]
        excess = normal.square().mean(1) + self.mlp.norm.epsilon / s.square() - 1
        cost = outside.square().sum(1) + _NORM_WEIGHT * u.shape[1] * excess.square()
        cost = torch.where((s > 1e-6) & cost.isfinite(), cost, torch.inf)
        gap = self.attended_origin[positions] + v @ self.attended.T - target
        return _State(
            positions, target, v, s, u, outside, normal, excess, gap,
            residual=torch.maximum(outside.norm(dim=1) / size, _UNNORMED * excess.abs()),
            cost=cost, apart=gap.square().sum(1),
        )  # fmt: skip

    def _step(self, state: _State, damping: Tensor, pull: Tensor) -> Tensor:
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
        if bool(pull.any()):
            normal = normal + pull[:, None, None] * (self.attended.T @ self.attended)
            right = right + pull[:, None] * (state.gap @ self.attended)
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
    target: Tensor
    v: Tensor
    s: Tensor
    u: Tensor
    outside: Tensor
    normal: Tensor
    excess: Tensor
    gap: Tensor
    residual: Tensor
    cost: Tensor
    apart: Tensor

    def _all(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def pick(self, rows: Tensor) -> _State:
        return _State(*(t[rows] for t in self._all()))

    def where(self, better: Tensor, other: _State) -> _State:
        pairs = zip(self._all(), other._all(), strict=True)
        return _State(
            *(torch.where(better.reshape(-1, *[1] * (a.dim() - 1)), b, a) for a, b in pairs)
        )
