"""Separate a batch in the last block: the class tokens that enter its MLP, one for each image.

With class-token pooling the rows of dL/dW of fc1 and fc2 there have rank B: l = V1 m and act(W1 l +
b1) in span(V2) is a problem of B unknowns with one solution for each image. Levenberg-Marquardt
from many starts finds some. What is found is taken out: with D the gradient of fc1 in the basis V1,
D = sum_b d_b m_b^T, the other images obey m_c . (D^+ d_b) = 0, and likewise in fc2, so the rest is
the same problem with fewer unknowns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitguard.attacks.budget import ENDLESS, Budget, charge
from vitguard.attacks.cascade.tail import Reading, Tail
from vitguard.attacks.equations.linear import solve_positive
from vitguard.attacks.equations.mlp import Activation, Norm, activation_of, thin_basis
from vitguard.attacks.equations.rows import layer_rows
from vitguard.core import View
from vitguard.vit import Anatomy, Block

__all__ = ["LastBlock", "Separated", "separate"]

_WORK = 2e9  # multiplications in a round of starts: about a second on one core
_STARTS = 64
_PATIENCE = 2  # rounds without a new image
_FIRST, _LARGE = (3, 8), 32  # rounds before the first one, in batches up to 32 and above
_NEAR = 0.05  # residual in the reduced problem from which the whole one converges
_APART = 1e-2
_STEADY = 0.05


@dataclass(frozen=True)
class LastBlock:
    """l = V1 m with act(W1 l + b1) in the span V2, of the last block.

    Args:
        inner, constant: V1 and the row of the bias gradient, shapes (width, B) and (B,).
        span: V2 with the row of the bias gradient, shape (hidden + 1, B).
        weight, bias: fc1's.
        out, shift: fc2's weight and bias, layer scale included.
        inner_gradient, outer_gradient: [dL/dW | dL/db] of fc1 and fc2 in the bases V1 and V2,
            shapes (hidden, B) and (width, B).
    """

    inner: Tensor
    constant: Tensor
    span: Tensor
    weight: Tensor
    bias: Tensor
    out: Tensor
    shift: Tensor
    activation: Activation
    norm: Norm
    inner_gradient: Tensor
    outer_gradient: Tensor
    scale: Tensor

    @staticmethod
    def of(view: View, anatomy: Anatomy, scale: Tensor) -> LastBlock:
        """Read the last block; `scale` is the layer scale of its MLP.

        Raises:
            Blocked: The gradient of fc1 or fc2 cannot be read.
            NotApplicable: An MLP or norm of another form.
        """
        return LastBlock.at(view, anatomy.blocks[-1], view.update.batch_size, scale)

    @staticmethod
    def at(view: View, block: Block, batch: int, scale: Tensor) -> LastBlock:
        """Read the MLP of any block, into which `batch` vectors entered.

        Raises:
            Blocked: The gradient of fc1 or fc2 cannot be read.
            NotApplicable: An MLP or norm of another form.
        """
        rows, outer = layer_rows(view, block.fc1), layer_rows(view, block.fc2)
        width = rows.matrix.shape[1] - int(rows.augmented)
        basis, _ = thin_basis(rows.matrix, batch)
        span, _ = thin_basis(outer.matrix, batch)
        outer_gradient = outer.matrix @ span
        if not outer.augmented:
            span = torch.cat([span, span.new_zeros(1, batch)])
        return LastBlock(
            inner=basis[:width],
            constant=basis[width] if rows.augmented else basis.new_zeros(batch),
            span=span,
            weight=view.weight(f"{block.fc1}.weight"),
            bias=view.bias(block.fc1),
            out=view.weight(f"{block.fc2}.weight"),
            shift=view.bias(block.fc2),
            activation=activation_of(view, block),
            norm=Norm.of(view, block.norm2),
            inner_gradient=rows.matrix @ basis,
            outer_gradient=outer_gradient,
            scale=scale,
        )

    def misfit(self, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals of the activations and of the bias coordinate, and pre-activations."""
        u = self.pre_activations(m)
        a = self.activation.value(u)
        has_bias = float(bool(self.span[-1].any()))
        a = torch.cat([a, torch.full_like(a[:, :1], has_bias)], 1)
        outside = a - (a @ self.span) @ self.span.T
        return outside, a.norm(dim=1), u

    def residual(self, m: Tensor) -> Tensor:
        """Return the relative residual of each vector's activations."""
        outside, size, _ = self.misfit(m)
        return outside.norm(dim=1) / size

    def pre_activations(self, m: Tensor) -> Tensor:
        """Return fc1's outputs, shape (images, hidden)."""
        return m @ (self.weight @ self.inner).T + self.bias

    def read(self, m: Tensor, tail: Tail) -> Reading:
        """Return each image's label and own gradient."""
        hidden = self.activation.value(self.pre_activations(m))
        added = self.scale * (hidden @ self.out.T + self.shift)
        normal = (m @ self.inner.T - self.norm.shift) / away_from_zero(self.norm.scale)
        whole = torch.linalg.qr(self.outer_gradient, mode="complete").Q
        return tail.read(normal, added, whole[:, self.outer_gradient.shape[1] :])

    def without(self, m: Tensor, gradients: Tensor) -> tuple[LastBlock, Tensor]:
        """Return the problem of the images other than `m`, whose own gradients are known.

        Also its basis in this problem's coordinates, as columns.
        """
        inner = (gradients @ self.out) * self.activation.slope(self.pre_activations(m))
        first = _orthogonal_to(_duals(self.inner_gradient, inner))
        second = _orthogonal_to(_duals(self.outer_gradient, gradients))
        inner, constant = self.inner @ first, self.constant @ first
        return replace(self, inner=inner, constant=constant, span=self.span @ second), first

    def weights(self, m: Tensor, gradients: Tensor) -> Tensor:
        """Return the weight each image's own gradient has in the update: 1 / B when plain."""
        a = self.activation.value(self.pre_activations(m))
        one = torch.full_like(a[:, :1], float(bool(self.span[-1].any())))
        inside = torch.cat([a, one], 1) @ self.span
        return 1 / (inside * _solve(self.outer_gradient, gradients)).sum(1)


@dataclass(frozen=True)
class Separated:
    """The images of a batch that were found.

    Args:
        m, residual: Coordinates and misfits to the span.
        weights, steady: Of each image's own gradient in the update, and which agree on it.
        reading: What each says; None where none was found.
        cut: Whether the budget ended the search.
    """

    m: Tensor
    residual: Tensor
    weights: Tensor
    steady: Tensor
    reading: Reading | None
    cut: bool = False


def separate(
    block: LastBlock,
    tail: Tail,
    generator: torch.Generator,
    *,
    accept: float,
    budget: Budget = ENDLESS,
    rounds: int = 40,
) -> Separated:
    """Find the images of the batch, at most one solution for each.

    Args:
        block: The problem.
        tail: What follows it, to take out what is found.
        generator: Of the starts.
        accept: Relative residual below which an image counts as found.
        budget: Of work; no round begins once it is spent.
        rounds: Of at most 64 starts, fewer where the MLP and the batch are large.
    """
    batch = block.inner.shape[1]
    found, residuals = block.inner.new_zeros(0, batch), block.inner.new_zeros(0)
    rest, idle, reading = block, 0, None
    basis = torch.eye(batch).to(block.inner)
    while len(found) < batch and rounds and not budget.over:
        if idle >= (_PATIENCE if len(found) else _FIRST[batch > _LARGE]):
            break
        rounds -= 1
        m, residual = descend(rest, _starts(rest, generator), budget)
        if rest is not block:  # what was taken out is known to rounding only: finish in the whole
            m = m[residual < _NEAR] @ basis.T
            m, residual = descend(block, m, budget, iterations=25)
        before = len(found)
        for row in residual.argsort().tolist():
            gap = (found - m[row]).norm(dim=1) / m[row].norm()
            if residual[row] < accept and len(found) < batch and bool((gap > _APART).all()):
                found = torch.cat([found, m[row : row + 1]])
                residuals = torch.cat([residuals, residual[row : row + 1]])
        if len(found) > before:
            new = block.read(found[before:], tail)
            reading = new if reading is None else Reading.joined([reading, new])
            weights = block.weights(found, reading.gradients)
            told, steady = reading.labels >= 0, _steady(weights, reading.labels, batch)
            if int(steady.sum()) * 2 >= int(told.sum()):
                # An image's weight is 1 / B; another one shows a solution that is no image.
                real = steady | ~told
                found, residuals, reading = found[real], residuals[real], reading.where(real)
                told = steady[real]
            if bool(told.any()) and len(found) < batch:
                rest, basis = block.without(found[told], reading.gradients[told])
        idle = 0 if len(found) > before else idle + 1
    if reading is None:
        return Separated(found, residuals, residuals, residuals > 0, None, budget.over)
    weights = block.weights(found, reading.gradients)
    steady = _steady(weights, reading.labels, batch)
    cut = budget.over and len(found) < batch
    return Separated(found, residuals, weights, steady, reading, cut)


def _steady(weights: Tensor, labels: Tensor, batch: int) -> Tensor:
    """Return which images have a label and the weight that they share, 1 / B or clipped to less."""
    told = labels >= 0
    if not bool(told.any()):
        return told
    middle = weights[told].median()
    fits = 0 < float(middle) * batch < 1 + _STEADY
    return told & ((weights - middle).abs() < _STEADY * middle) & fits


def _starts(block: LastBlock, generator: torch.Generator) -> Tensor:
    batch = block.inner.shape[1]
    each = 120 * len(block.weight) * batch * batch
    count = min(_STARTS, max(8, int(_WORK / each)))
    draw = torch.randn(count, batch, generator=generator, dtype=torch.float64).to(block.inner)
    # LayerNorm outputs have a known size: scale * unit variance + shift.
    size = (block.norm.scale.square() + block.norm.shift.square()).sum().sqrt()
    return draw / draw.norm(dim=1, keepdim=True) * size


def _solve(matrix: Tensor, rows: Tensor) -> Tensor:
    """Least squares of matrix x = row for each row."""
    return torch.linalg.lstsq(matrix, rows.T, driver="gelsd").solution.T


def _duals(matrix: Tensor, gradients: Tensor) -> Tensor:
    found = _solve(matrix, gradients)
    return found / found.norm(dim=1, keepdim=True).clamp_min(1e-300)


def _orthogonal_to(rows: Tensor) -> Tensor:
    """Orthonormal basis of what is orthogonal to all rows, as columns."""
    return torch.linalg.qr(rows.T, mode="complete").Q[:, len(rows) :]


def descend(
    block: LastBlock, m: Tensor, budget: Budget, iterations: int = 60
) -> tuple[Tensor, Tensor]:
    """Levenberg-Marquardt from each row of m within the budget; return ends and residuals."""
    across = block.weight @ block.inner  # hidden, batch
    scale, shift = block.norm.scale, block.norm.shift
    weight = 0.01 * len(across)

    def cost_of(m: Tensor) -> tuple[Tensor, ...]:
        outside, size, u = block.misfit(m)
        flat = ((m @ block.inner.T) - shift) / away_from_zero(scale)
        power = torch.stack([flat.mean(1), flat.square().mean(1) - 1, m @ block.constant - 1], 1)
        if not bool(block.constant.any()):
            power = power * power.new_tensor([1, 1, 0])
        cost = outside.square().sum(1) + weight * power.square().sum(1)
        return cost, outside, size, u, flat, power

    damping = m.new_full((len(m),), 0.1)
    cost, outside, size, u, flat, power = cost_of(m)
    inverse = block.inner / away_from_zero(scale)[:, None]
    width, (hidden, batch) = len(scale), across.shape
    each = 12.0 * hidden * batch * batch + 6.0 * hidden * batch + 4.0 * width * batch + batch**3
    passes = hidden * (6.0 + 0.3 * batch) + 2.0 * width
    for _ in range(iterations):
        if budget.over:  # one step of a large batch takes a second
            break
        charge(products=len(m) * each, elements=len(m) * passes, calls=100)
        jacobian = block.activation.slope(u)[:, :, None] * across
        inside = block.span[:-1].T @ jacobian
        normal = jacobian.mT @ jacobian - inside.mT @ inside
        right = (jacobian.mT @ outside[:, :-1, None])[..., 0]
        rows = torch.stack(
            [
                inverse.mean(0).expand(len(m), -1),
                2 / width * flat @ inverse,
                block.constant.expand(len(m), -1),
            ],
            1,
        )
        normal = normal + weight * rows.mT @ rows
        right = right + weight * (rows.mT @ power[:, :, None])[..., 0]
        diagonal = normal.diagonal(dim1=1, dim2=2)
        lift = damping[:, None] * (diagonal + 1e-12 * diagonal.amax(1, keepdim=True))
        trial = m - solve_positive(normal + torch.diag_embed(lift), right)
        new = cost_of(trial)
        better = new[0] < cost
        damping = torch.where(better, damping * 0.3, damping * 4).clamp(1e-12, 1e8)
        wide = better[:, None]
        m = torch.where(wide, trial, m)
        cost, size = torch.where(better, new[0], cost), torch.where(better, new[2], size)
        outside, u = torch.where(wide, new[1], outside), torch.where(wide, new[3], u)
        flat, power = torch.where(wide, new[4], flat), torch.where(wide, new[5], power)
    return m, outside.norm(dim=1) / size


def away_from_zero(scale: Tensor) -> Tensor:
    """Return a norm's scale fit to divide by."""
    return torch.where(scale.abs() < 1e-3, 1e-3, scale)
