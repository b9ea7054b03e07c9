"""One known token out of the gradient of the first block: what is left is a smaller problem.

dL/dW2 = sum_t d_t a_t^T and dL/dW1 = sum_t e_t l_t^T with e_t = act'(u_t) * (W2^T d_t). With l_t,
u_t and a_t of one token known, its d is the one vector with

    d in the column space of dL/dW2    and    act'(u) * (W2^T d) in that of dL/dW1,

T unknowns in hidden - T linear equations; its length follows from a^T (dL/dW2)^+ d = 1. The norm's
derivative then gives what reached the attention's projection. Each is subtracted from its layer.
That l^T (dL/dW1)^+ e = 1 and the same of the projection are not used: they prove the token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.attacks.equations.mlp import Activation, Norm, activation_of
from vitguard.core import View
from vitguard.vit import Anatomy

__all__ = ["Parts", "TokenGradients"]

_ALIKE = 3e-2  # how far from 1 the proofs of a token may be
_ALONE = 1e-4  # second smallest against smallest misfit of d, squared


@dataclass(frozen=True)
class _Layer:
    """dL/dW = left diag(values) right^T of one linear layer, of the rank of its tokens."""

    left: Float[Tensor, "outputs tokens"]
    values: Float[Tensor, " tokens"]
    right: Float[Tensor, "inputs tokens"]

    @staticmethod
    def of(matrix: Tensor, tokens: int) -> _Layer:
        tall, small = matrix.shape[0] > matrix.shape[1], min(matrix.shape)
        charge(qr=2 * matrix.numel() * small, svd=small**3)
        outer, inner = torch.linalg.qr(matrix if tall else matrix.T)
        left, values, right = torch.linalg.svd(inner)
        left, right = outer @ left[:, :tokens], right[:tokens].T
        return _Layer(*((left, values[:tokens], right) if tall else (right, values[:tokens], left)))

    def share(self, slope: Tensor, inputs: Tensor) -> Float[Tensor, " found"]:
        """Return x^T (dL/dW)^+ d of each token: 1 for its own gradient d and input x."""
        return ((inputs @ self.right) * (slope @ self.left) / self.values).sum(1)


@dataclass(frozen=True)
class Parts:
    """Gradients at the outputs of fc1, fc2 and the projection, and their inputs, token by token."""

    errors: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.inputs[0])


@dataclass(frozen=True)
class TokenGradients:
    """Each known token's own part in the gradients of fc1, fc2 and the attention's projection."""

    view: View
    names: tuple[str, str, str]
    fc1: _Layer
    fc2: _Layer
    project: _Layer
    into: tuple[Tensor, Tensor]
    back: Float[Tensor, "hidden tokens"]
    second: Tensor
    norm: Norm
    activation: Activation
    scales: tuple[Tensor | float, Tensor | float]

    @staticmethod
    def of(view: View, anatomy: Anatomy, tokens: int) -> TokenGradients:
        """Read the three layers of the first block, whose gradients sum over so many tokens.

        Raises:
            Blocked: One of the gradients cannot be read.
            NotApplicable: The MLP is not of this form.
        """
        block = anatomy.blocks[0]
        names = (block.fc1, block.fc2, block.proj)
        layers = [_Layer.of(view.read(f"{name}.weight"), tokens) for name in names]
        second = view.weight(f"{block.fc2}.weight")
        return TokenGradients(
            view=view, names=names, fc1=layers[0], fc2=layers[1], project=layers[2],
            into=(view.weight(f"{block.fc1}.weight"), view.bias(block.fc1)),
            back=second.T @ layers[1].left, second=second, norm=Norm.of(view, block.norm2),
            activation=activation_of(view, block),
            scales=(
                1.0 if block.scale1 is None else view.weight(block.scale1),
                1.0 if block.scale2 is None else view.weight(block.scale2),
            ),
        )  # fmt: skip

    def parts(
        self, stream: Float[Tensor, "found width"], attended: Float[Tensor, "found width"]
    ) -> tuple[Parts, Bool[Tensor, " found"]]:
        """Return what known tokens put into the three layers, of those that prove themselves.

        The second value says which these are.

        Args:
            stream: h of each token, in front of the second norm.
            attended: o of each token, in front of the attention's projection.
        """
        inputs = self.norm(stream)
        hidden = inputs @ self.into[0].T + self.into[1]
        slope = self.activation.slope(hidden)
        outer, alone = self._outer(slope)
        activations = self.activation.value(hidden)
        outer = outer / self.fc2.share(outer, activations)[:, None]
        inner = slope * (outer @ self.second)
        upper = outer / self.scales[1] + self.norm.pulled(stream, inner @ self.into[0])
        upper = upper * self.scales[0]
        proofs = torch.stack([self.fc1.share(inner, inputs), self.project.share(upper, attended)])
        proved = alone & ((proofs - 1).abs() < _ALIKE).all(0)
        return Parts(
            tuple(error[proved] for error in (inner, outer, upper)),
            tuple(entered[proved] for entered in (inputs, activations, attended)),
        ), proved

    def without(self, parts: list[Parts]) -> View:
        """Return the view without these parts."""
        tensors = dict(self.view.update.tensors)
        for index, name in enumerate(self.names):
            charge(elements=0.3 * self.view.read(f"{name}.weight").numel(), calls=20)
            error = torch.cat([part.errors[index] for part in parts])
            entered = torch.cat([part.inputs[index] for part in parts])
            weight, bias = f"{name}.weight", f"{name}.bias"
            tensors[weight] = self.view.read(weight) - error.T @ entered
            if self.view.update.can_read(bias):
                tensors[bias] = self.view.read(bias) - error.sum(0)
        return replace(self.view, update=replace(self.view.update, tensors=tensors))

    def _outer(self, slope: Float[Tensor, "found hidden"]) -> tuple[Tensor, Tensor]:
        """Return the direction of d of each token, and whether it is the only one."""
        directions, alone = [], []
        for one in slope:
            tokens = self.back.shape[1]
            charge(products=6.0 * self.back.numel() * tokens, qr=2 * tokens**3, calls=12)
            moved = one[:, None] * self.back
            inside = self.fc1.left.T @ moved
            values, vectors = torch.linalg.eigh(moved.T @ moved - inside.T @ inside)
            directions.append(self.fc2.left @ vectors[:, 0])
            alone.append(bool(values[0].abs() < _ALONE * values[1]))
        return torch.stack(directions), torch.tensor(alone, device=slope.device)
