"""What an MLP's gradient says about its tokens: their activations lie in a known span.

dL/dW of fc2 = sum_t d_t a_t^T, so a true token's activation a = act(W1 l + b1) lies in the span of
the T strongest right singular vectors of [dL/dW | dL/db]. While T < D this leaves hidden - T
equations per token (docs/methods.md 2.4b).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitguard.attacks.budget import charge
from vitguard.attacks.equations.probe import probe
from vitguard.attacks.equations.rows import layer_rows
from vitguard.core import View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy, Block

__all__ = ["Activation", "Mlp", "Norm", "activation_of", "thin_basis"]


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative."""

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _gelu_slope(u: Tensor) -> Tensor:
    density = torch.exp(u.square().mul_(-0.5)).div_(math.sqrt(2 * math.pi))
    return torch.special.ndtr(u).addcmul_(u, density)


def _tanh_gelu(u: Tensor) -> Tensor:
    return nn.functional.gelu(u, approximate="tanh")


def _slope_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def slope(u: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            return torch.autograd.grad(function(leaf).sum(), leaf)[0]

    return slope


def _quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(1.702 * u)


_KNOWN = (
    Activation("gelu", nn.functional.gelu, _gelu_slope),
    Activation("gelu-tanh", _tanh_gelu, _slope_of(_tanh_gelu)),
    Activation("quick-gelu", _quick_gelu, _slope_of(_quick_gelu)),
    Activation("silu", nn.functional.silu, _slope_of(nn.functional.silu)),
    Activation("relu", nn.functional.relu, lambda u: (u > 0).to(u)),
)


def activation_of(view: View, block: Block) -> Activation:
    """Recognise the activation between fc1 and fc2 by what it does, whatever it is called.

    Raises:
        NotApplicable: It is none of the known elementwise functions (a gate, a norm in between).
    """
    if block.gated:
        raise NotApplicable("a gated MLP has no single activation")
    after, before = (t.double() for t in probe(view, entering=[block.fc2], leaving=[block.fc1]))
    for known in _KNOWN:
        # The kinds of GELU differ by 1e-4 and more, float32 rounding by 1e-6.
        if before.shape == after.shape and torch.allclose(known.value(before), after, atol=2e-5):
            return known
    raise NotApplicable("the MLP's activation is not a known elementwise function")


@dataclass(frozen=True)
class Norm:
    """A layer norm's scale gamma, shift beta and epsilon, in float64."""

    scale: Tensor
    shift: Tensor
    epsilon: float

    @staticmethod
    def of(view: View, name: str) -> Norm:
        """Read the norm called `name`.

        Raises:
            NotApplicable: It is no LayerNorm.
        """
        module = view.model.get_submodule(name)
        if not isinstance(module, nn.LayerNorm):
            raise NotApplicable(f"{name} is {type(module).__name__}, not LayerNorm")
        one = next(view.model.parameters()).new_ones(module.normalized_shape, dtype=torch.float64)
        scale = one if module.weight is None else view.weight(f"{name}.weight")
        shift = 0 * one if module.bias is None else view.weight(f"{name}.bias")
        return Norm(scale, shift, module.eps)

    def __call__(self, h: Tensor) -> Tensor:
        """Apply the norm to the last dimension."""
        return nn.functional.layer_norm(h, h.shape[-1:], self.scale, self.shift, self.epsilon)

    def plain(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return h without mean and at unit variance, and the deviation it was divided by."""
        centred = h - h.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        return centred / deviation, deviation

    def pushed(self, h: Tensor, moves: Tensor) -> Tensor:
        """Return how the output moves where the input h moves so."""
        return self.scale * _plain_derivative(*self.plain(h), moves)

    def pulled(self, h: Tensor, slopes: Tensor) -> Tensor:
        """Return the gradient by the input h of what has gradient `slopes` by the output."""
        return _plain_derivative(*self.plain(h), self.scale * slopes)


def _plain_derivative(flat: Tensor, deviation: Tensor, moves: Tensor) -> Tensor:
    """The derivative of a norm without scale: symmetric, so forward and backward are the same."""
    along = flat * (moves * flat).mean(-1, keepdim=True)
    return (moves - moves.mean(-1, keepdim=True) - along) / deviation


def thin_basis(
    matrix: Float[Tensor, "rows columns"], rank: int
) -> tuple[Float[Tensor, "columns rank"], Float[Tensor, " values"]]:
    """Return a basis of the `rank` strongest row directions, and all singular values."""
    if not bool(matrix.isfinite().all()):
        raise NotApplicable("the update is not finite")
    small = min(matrix.shape)
    charge(qr=2 * matrix.numel() * small, svd=small**3)
    if matrix.shape[1] > matrix.shape[0]:  # a QR first makes the SVD a small one
        outer, inner = torch.linalg.qr(matrix.T)
        left, values, _ = torch.linalg.svd(inner)
        return outer @ left[:, :rank], values
    inner = torch.linalg.qr(matrix, mode="r").R
    _, values, vectors = torch.linalg.svd(inner)
    return vectors[:rank].T.contiguous(), values


@dataclass(frozen=True)
class Mlp:
    """One block's second norm, fc1, activation, and the span of fc2's inputs.

    Args:
        norm: The norm in front of fc1.
        weight, bias: fc1, shapes (hidden, width) and (hidden,).
        activation: Between fc1 and fc2.
        span: Orthonormal basis of the row space of [dL/dW2 | dL/db2], shape (hidden + 1, tokens);
            the last row is 0 where the bias gradient cannot be read.
        augmented: Whether that bias gradient was read.
    """

    norm: Norm
    weight: Float[Tensor, "hidden width"]
    bias: Float[Tensor, " hidden"]
    activation: Activation
    span: Float[Tensor, "hidden1 tokens"]
    augmented: bool

    @staticmethod
    def of(view: View, anatomy: Anatomy, block: Block, tokens: int) -> Mlp:
        """Read the MLP of `block`, whose gradient sums over `tokens` tokens.

        Raises:
            NotApplicable: The span is full (tokens >= width), or the MLP is not of this form.
            Blocked: The gradient of fc2's weight cannot be read.
        """
        if tokens >= anatomy.width:
            raise NotApplicable(
                f"{tokens} tokens saturate the spans of width {anatomy.width}: "
                "no exact attack is known"
            )
        activation = activation_of(view, block)
        rows = layer_rows(view, block.fc2)
        span, _ = thin_basis(rows.matrix, tokens)
        if not rows.augmented:
            span = torch.cat([span, span.new_zeros(1, span.shape[1])])
        return Mlp(
            norm=Norm.of(view, block.norm2),
            weight=view.weight(f"{block.fc1}.weight"),
            bias=view.bias(block.fc1),
            activation=activation,
            span=span,
            augmented=rows.augmented,
        )

    def to(self, dtype: torch.dtype) -> Mlp:
        """Return the span and the norm's epsilon in another precision, for the iteration."""
        return replace(
            self, weight=self.weight.to(dtype), bias=self.bias.to(dtype), span=self.span.to(dtype)
        )

    def some(self, units: int, generator: torch.Generator) -> Mlp:
        """Return the same of a random choice of hidden units: fewer equations, each still true."""
        hidden = len(self.weight)
        if units >= hidden:
            return self
        rows = torch.randperm(hidden, generator=generator)[:units].sort().values
        rows = rows.to(self.weight.device)
        charge(qr=2 * units * self.span.shape[1] ** 2)
        span = torch.cat([self.span[rows], self.span[-1:]])
        return replace(
            self, weight=self.weight[rows], bias=self.bias[rows], span=torch.linalg.qr(span)[0]
        )

    def misfit(self, u: Float[Tensor, "tokens hidden"]) -> tuple[Tensor, Tensor]:
        """Return what of the activations lies outside the span, and the activations' norms."""
        a = self.activation.value(u)
        one = torch.full_like(a[:, :1], float(self.augmented))
        a = torch.cat([a, one], 1)
        return a - (a @ self.span) @ self.span.T, a.norm(dim=1)
