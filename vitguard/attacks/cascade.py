"""Cascade: labels and per-sample last-block gradients of a batch, from the class token alone."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.attacks._base import Attack
from vitguard.attacks._check import check_seconds, require_finite
from vitguard.attacks._mlp import Activation, Norm, activation_of, thin_basis
from vitguard.attacks._spans import layer_rows
from vitguard.attacks.labels import linear_head
from vitguard.core import Guess, View
from vitguard.errors import NotApplicable, expected
from vitguard.vit import Anatomy

__all__ = ["Cascade", "Samples", "last_block_samples"]


@dataclass(frozen=True)
class Samples:
    """What the last block's MLP says about every image of a batch.

    Args:
        inputs: fc1's inputs l_b of the class tokens, shape (batch, width).
        hidden: Their activations, shape (batch, hidden).
        gradients: dL_b/d(fc2 output), summed loss over the batch divided by B, (batch, width).
        residual: Relative misfit of each activation to the span of fc2's rows, shape (batch,).
        labels: Shape (batch,).
    """

    inputs: Float[Tensor, "batch width"]
    hidden: Float[Tensor, "batch hidden"]
    gradients: Float[Tensor, "batch width"]
    residual: Float[Tensor, " batch"]
    labels: Int[Tensor, " batch"] | None


@dataclass(frozen=True)
class Cascade(Attack):
    """Separate a batch in the last block of a class-token model; gives labels, not images.

    With class-token pooling only B tokens of the last block reach the loss, so the rows of
    dL/dW_fc1 and dL/dW_fc2 there have rank B: l = V1 m + 0 and act(W1 l + b1) in span(V2) is a
    problem of B unknowns. Many-start Levenberg-Marquardt finds the B solutions; least squares on
    dL/dW_fc2 gives each image's own gradient; and each image's head gradient gives its label.

    The guess has labels and no image: it makes no claim on pixels. `details` has the number of
    samples and their largest residual.

    Args:
        seconds: Time budget.
        accept: Relative residual below which a sample counts as found.

    Raises:
        NotApplicable: No class-token pooling, more than width - 1 images, or samples not found.
        Blocked: A gradient of the last MLP or of the head cannot be read.

    References:
        docs/methods.md 2.5b.
    """

    name: ClassVar[str] = "cascade"
    family: ClassVar[str] = "ladder"
    seconds: float = 10.0
    accept: float = 1e-3

    def __post_init__(self) -> None:
        check_seconds(self.seconds)
        if not 0 < self.accept < 0.01:
            raise expected("accept between 0 and 0.01", self.accept)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return the labels of the batch without an image."""
        view = view.gradient()
        require_finite(view)
        samples = last_block_samples(view, generator, seconds=self.seconds, accept=self.accept)
        found, batch = len(samples.inputs), view.update.batch_size
        if samples.labels is None or found < batch:
            raise NotApplicable(f"{found} of {batch} samples of the last block were found")
        details = {"samples": found, "residual": float(samples.residual.max())}
        none = torch.zeros(0, *view.image_shape)
        return Guess(images=none, labels=samples.labels.sort().values, details=details)


def last_block_samples(
    view: View, generator: torch.Generator, *, seconds: float = 10.0, accept: float = 1e-3
) -> Samples:
    """Return the samples of the last block that were found, at most one per image.

    Raises:
        NotApplicable: See `Cascade`.
        Blocked: See `Cascade`.
    """
    anatomy = Anatomy.of(view.model)
    batch = view.update.batch_size
    if anatomy.pooling != "token" or not anatomy.prefix_tokens:
        raise NotApplicable(f"needs class-token pooling, got {anatomy.pooling}")
    if batch >= anatomy.width - 1:
        raise NotApplicable(f"{batch} images fill width {anatomy.width}")
    problem = _Problem.of(view, anatomy)
    weights, residual = _search(problem, batch, generator, seconds, accept)
    inputs = weights @ problem.inner.T
    hidden = problem.activation.value(inputs @ problem.weight.T + problem.bias)
    gradients = hidden.new_zeros(len(hidden), anatomy.width)
    labels = None
    if len(hidden):
        gradients = torch.linalg.lstsq(hidden.T, problem.outer_gradient.T, driver="gelsd").solution
    if len(hidden) == batch:
        labels = _labels(view, anatomy, problem, inputs, hidden, gradients)
    return Samples(inputs, hidden, gradients, residual, labels)


@dataclass(frozen=True)
class _Problem:
    """l = V1 m with act(W1 l + b1) in the span V2, of the last block."""

    inner: Tensor
    constant: Tensor
    span: Tensor
    weight: Tensor
    bias: Tensor
    activation: Activation
    norm: Norm
    outer_gradient: Tensor

    @staticmethod
    def of(view: View, anatomy: Anatomy) -> _Problem:
        block, batch = anatomy.blocks[-1], view.update.batch_size
        rows = layer_rows(view, block.fc1)
        basis, _ = thin_basis(rows.matrix, batch)
        width = anatomy.width
        outer = layer_rows(view, block.fc2)
        span, _ = thin_basis(outer.matrix, batch)
        if not outer.augmented:
            span = torch.cat([span, span.new_zeros(1, batch)])
        constant = basis[width] if rows.augmented else basis.new_zeros(batch)
        return _Problem(
            inner=basis[:width],
            constant=constant,
            span=span,
            weight=view.weight(f"{block.fc1}.weight"),
            bias=view.weight(f"{block.fc1}.bias"),
            activation=activation_of(view, block),
            norm=Norm.of(view, block.norm2),
            outer_gradient=view.read(f"{block.fc2}.weight"),
        )

    def misfit(self, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals of the activations and of the bias coordinate, and pre-activations."""
        u = m @ (self.weight @ self.inner).T + self.bias
        a = self.activation.value(u)
        has_bias = float(bool(self.span[-1].any()))
        a = torch.cat([a, torch.full_like(a[:, :1], has_bias)], 1)
        outside = a - (a @ self.span) @ self.span.T
        return outside, a.norm(dim=1), u


def _search(
    problem: _Problem, batch: int, generator: torch.Generator, seconds: float, accept: float
) -> tuple[Tensor, Tensor]:
    """Many-start Levenberg-Marquardt in R^B; return distinct solutions and their residuals."""
    deadline = time.monotonic() + seconds
    found = problem.inner.new_zeros(0, batch)
    residuals = problem.inner.new_zeros(0)
    while len(found) < batch and time.monotonic() < deadline:
        draw = torch.randn(64, batch, generator=generator, dtype=torch.float64).to(problem.inner)
        # LayerNorm outputs have a known size: scale * unit variance + shift.
        size = (problem.norm.scale.square() + problem.norm.shift.square()).sum().sqrt()
        draw = draw / draw.norm(dim=1, keepdim=True) * size
        m, residual = _descend(problem, draw)
        order = residual.argsort()
        for row in order[residual[order] < accept].tolist():
            gap = (found - m[row]).norm(dim=1) / m[row].norm()
            if len(found) < batch and bool((gap > 1e-2).all()):
                found = torch.cat([found, m[row : row + 1]])
                residuals = torch.cat([residuals, residual[row : row + 1]])
    return found, residuals


def _descend(problem: _Problem, m: Tensor, iterations: int = 60) -> tuple[Tensor, Tensor]:
    across = problem.weight @ problem.inner  # hidden, batch
    scale, shift = problem.norm.scale, problem.norm.shift
    weight = 0.01 * len(across)

    def cost_of(m: Tensor) -> tuple[Tensor, ...]:
        outside, size, u = problem.misfit(m)
        flat = ((m @ problem.inner.T) - shift) / _away_from_zero(scale)
        power = torch.stack([flat.mean(1), flat.square().mean(1) - 1, m @ problem.constant - 1], 1)
        if not bool(problem.constant.any()):
            power = power * power.new_tensor([1, 1, 0])
        cost = outside.square().sum(1) + weight * power.square().sum(1)
        return cost, outside, size, u, flat, power

    damping = m.new_full((len(m),), 0.1)
    cost, outside, size, u, flat, power = cost_of(m)
    inverse = problem.inner / _away_from_zero(scale)[:, None]
    width = len(scale)
    for _ in range(iterations):
        jacobian = problem.activation.slope(u)[:, :, None] * across
        inside = problem.span[:-1].T @ jacobian
        normal = jacobian.mT @ jacobian - inside.mT @ inside
        right = (jacobian.mT @ outside[:, :-1, None])[..., 0]
        rows = torch.stack(
            [
                inverse.mean(0).expand(len(m), -1),
                2 / width * flat @ inverse,
                problem.constant.expand(len(m), -1),
            ],
            1,
        )
        normal = normal + weight * rows.mT @ rows
        right = right + weight * (rows.mT @ power[:, :, None])[..., 0]
        diagonal = normal.diagonal(dim1=1, dim2=2)
        lift = damping[:, None] * (diagonal + 1e-12 * diagonal.amax(1, keepdim=True))
        trial = m - torch.linalg.solve_ex(normal + torch.diag_embed(lift), right)[0]
        new = cost_of(trial)
        better = new[0] < cost
        damping = torch.where(better, damping * 0.3, damping * 4).clamp(1e-12, 1e8)
        wide = better[:, None]
        m = torch.where(wide, trial, m)
        cost, size = torch.where(better, new[0], cost), torch.where(better, new[2], size)
        outside, u = torch.where(wide, new[1], outside), torch.where(wide, new[3], u)
        flat, power = torch.where(wide, new[4], flat), torch.where(wide, new[5], power)
    return m, outside.norm(dim=1) / size


def _labels(
    view: View,
    anatomy: Anatomy,
    problem: _Problem,
    inputs: Tensor,
    hidden: Tensor,
    gradients: Tensor,
) -> Tensor | None:
    """Return each sample's label, or None where the head's gradient cannot be read.

    The class token after the block is h = s n + fc2(a) up to a constant, n = (l - beta) / gamma.
    The gradient through the final norm is orthogonal to that norm's output, which gives s, hence
    the head's input f_b and p_b. Least squares on dL/dW_head gives A_b = (p_b - y_b) / B.
    """
    block, batch = anatomy.blocks[-1], len(inputs)
    head = linear_head(view)
    if not view.update.can_read(f"{head}.weight"):
        return None
    norm, last = _final_norm(view, anatomy, head), problem.norm
    known = {name for name, _ in view.model.named_parameters()}
    bias = f"{block.fc2}.bias"
    added = hidden @ view.weight(f"{block.fc2}.weight").T
    added = added + view.weight(bias) if bias in known else added
    if block.scale2 is not None:
        scale = view.weight(block.scale2)
        added, gradients = added * scale, gradients / torch.where(scale == 0, torch.inf, scale)
    normal = (inputs - last.shift) / _away_from_zero(last.scale)
    s = -(gradients * (added - added.mean(1, keepdim=True))).sum(1) / (gradients * normal).sum(1)
    features = norm(s[:, None] * normal + added)
    weight = view.weight(f"{head}.weight")
    shift = view.weight(f"{head}.bias") if f"{head}.bias" in known else 0.0
    predicted = (features @ weight.T + shift).softmax(-1)
    gradient = view.read(f"{head}.weight")
    own = torch.linalg.lstsq(features.T, gradient.T, driver="gelsd").solution
    return (predicted - batch * own).argmax(1)


def _final_norm(view: View, anatomy: Anatomy, head: str) -> Norm:
    """Find the norm between the last block and the head by what it does to a test image."""
    seen: dict[str, Tensor] = {}
    model, parameter = view.model, next(view.model.parameters())

    def after_block(_module: object, _inputs: object, output: Tensor | tuple) -> None:
        seen["block"] = output if isinstance(output, Tensor) else output[0]

    hooks = [
        model.get_submodule(anatomy.blocks[-1].name).register_forward_hook(after_block),
        model.get_submodule(head).register_forward_pre_hook(
            lambda _module, args: seen.__setitem__("head", args[0])
        ),
    ]
    probe = torch.linspace(-1, 1, math.prod(view.image_shape)).reshape(1, *view.image_shape)
    try:
        with torch.no_grad():
            model(probe.to(parameter))
    finally:
        for hook in hooks:
            hook.remove()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm) and len(module.normalized_shape) == 1:
            norm = Norm.of(view, name)
            if len(norm.scale) == anatomy.width and torch.allclose(
                norm(seen["block"][0, 0].double()), seen["head"][0].double(), atol=1e-4
            ):
                return norm
    raise NotApplicable("no LayerNorm between the last block's class token and the head")


def _away_from_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < 1e-3, 1e-3, scale)
