"""The first block's span equations as one function of a whole image.

With every patch of an image known but for a small error, the attention output o_t follows from the
tokens, and each token must satisfy

    Q0^T [norm1(z_t); 1] = 0   and   Q1^T [norm2(h_t); 1] = 0,   h_t = z_t + W_o o_t + b_o,

with Q0 and Q1 the complements of the row spaces of dL/dW_qkv and dL/dW_fc1 (docs/methods.md 2.4):
2 (D - T) equations per token. A row space read with noise sigma misses token t by sigma |Delta_t^+|
(Delta: the coefficients of the rows over the tokens), which is what each equation is divided by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.attacks.equations.attention import Attention
from vitguard.attacks.equations.family import projection
from vitguard.attacks.equations.mlp import Norm
from vitguard.attacks.equations.rows import (
    Embedding,
    Rows,
    block_rows,
    layer_rows,
    patch_basis,
    right_vectors,
    whitened,
)
from vitguard.core import View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = ["BlockEquations", "Preconditioner"]


@dataclass(frozen=True)
class Span:
    """One layer's row space, in which [norm(stream); 1] lies.

    Args:
        norm: In front of the layer.
        rows: The gradient's rows at unit length.
        outside: Q, shape (width [+ 1], equations).
        noise: Standard deviation of an entry of `rows`, from its surplus singular values.
    """

    norm: Norm
    rows: Tensor
    outside: Tensor
    noise: float

    @staticmethod
    def of(norm: Norm, rows: Rows, tokens: int) -> Span:
        """Read the span of a layer that saw `tokens` tokens."""
        if tokens >= min(rows.matrix.shape):
            raise NotApplicable("the span is full")
        matrix = whitened(rows.matrix)
        outside = right_vectors(rows.matrix, tokens)[1][:, tokens:]
        left = (len(matrix) - tokens) * (matrix.shape[1] - tokens)
        noise = float((matrix @ outside).square().sum() / left) ** 0.5
        return Span(norm, matrix, outside, max(noise, 1e-17))

    def inputs(self, stream: Float[Tensor, "tokens width"]) -> Tensor:
        """[norm(stream); 1], without the 1 where the bias gradient was not read."""
        normed = self.norm(stream)
        if len(self.outside) == normed.shape[1]:
            return normed
        return torch.cat([normed, torch.ones_like(normed[:, :1])], 1)

    def doubt(self, stream: Float[Tensor, "tokens width"]) -> Float[Tensor, " tokens"]:
        """Return sigma |Delta_t^+| of every token."""
        count, width = stream.shape
        charge(svd=(width + len(self.rows)) * count**2, products=2.0 * self.rows.numel() * count)
        delta = torch.linalg.pinv(self.inputs(stream).T) @ self.rows.T
        return self.noise * torch.linalg.pinv(delta).norm(dim=0)

    def folded(self) -> Tensor:
        """C gamma Q: what the equations see of a token in front of its norm."""
        inner = self.outside[: len(self.norm.scale)] * self.norm.scale[:, None]
        return inner - inner.mean(0)


@dataclass(frozen=True)
class BlockEquations:
    """The equations of one update; unknowns c of an image's patches x_t = R c_t.

    Args:
        basis: R, shape (pixels, r).
        into: W R, shape (width, r).
        offset: b + e_t of each token, shape (tokens, width).
        prefix: Prefix tokens as they enter the block.
        attention: The block's attention.
        project, project_bias: W_o and b_o.
        early, late: The spans of qkv and of fc1.
    """

    basis: Tensor
    into: Tensor
    offset: Tensor
    prefix: Tensor
    attention: Attention
    project: Tensor
    project_bias: Tensor
    early: Span
    late: Span

    @staticmethod
    def of(view: View, anatomy: Anatomy) -> BlockEquations:
        """Read the equations.

        Raises:
            NotApplicable: T >= D, or a block of another form.
            Blocked: The gradient of fc1 or of query, key and value cannot be read.
        """
        if not anatomy.blocks or not anatomy.blocks[0].pre_norm or anatomy.positions is None:
            raise NotApplicable("the first block is not x + attention(norm(x)) after positions")
        block, batch = anatomy.blocks[0], view.update.batch_size
        embedding = Embedding.of(view, anatomy)
        basis = patch_basis(view, anatomy)
        if basis is None or basis.shape[1] >= anatomy.patch_pixels:
            basis = torch.eye(anatomy.patch_pixels).to(embedding.weight)
        project, bias = projection(view, anatomy)
        once = batch * anatomy.patches + anatomy.prefix_tokens
        return BlockEquations(
            basis=basis, into=embedding.weight @ basis, offset=embedding.offset,
            prefix=embedding.prefix, attention=Attention.of(view, anatomy),
            project=project, project_bias=bias,
            early=Span.of(Norm.of(view, block.norm1), block_rows(view, block), once),
            late=Span.of(Norm.of(view, block.norm2), layer_rows(view, block.fc1),
                         batch * anatomy.tokens),
        )  # fmt: skip

    def streams(self, c: Float[Tensor, "patches r"]) -> tuple[Tensor, Tensor]:
        """Return z and h of every token, prefix tokens first."""
        z = torch.cat([self.prefix, c @ self.into.T + self.offset])
        attended = self.attention.attend(*self.attention.maps(z))
        return z, z + attended @ self.project.T + self.project_bias

    def charge(self, times: float) -> None:
        """Count `times` the work of `misfits`."""
        tokens, width = self.offset.shape[0] + len(self.prefix), self.offset.shape[1]
        outside = self.early.outside.numel() + self.late.outside.numel()
        each = 2.0 * tokens * (outside + 5 * width * width + 2 * tokens * width)
        charge(products=times * each, elements=times * tokens * width, calls=40 * times)

    def misfits(self, c: Float[Tensor, "patches r"], weights: Weights) -> Tensor:
        """Return what is outside the spans, (patches, equations), each divided by its doubt."""
        own = len(self.prefix)
        z, h = (stream[own:] for stream in self.streams(c))
        parts = [
            (span.inputs(stream) @ span.outside) * weight[:, None]
            for span, stream, weight in zip((self.early, self.late), (z, h), weights, strict=True)
        ]
        return torch.cat(parts, 1)

    def weights(self, c: Float[Tensor, "patches r"]) -> Weights:
        """Return 1 / doubt of every patch's equations of qkv and of fc1."""
        z, h = self.streams(c)
        early, late = 1 / self.early.doubt(z), 1 / self.late.doubt(h)
        return early[len(self.prefix) :], late[len(self.prefix) :]


Weights = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Preconditioner:
    """An approximate inverse root of J^T J: tokens decouple but for what attention averages.

    Each token alone gives a_t G, with G from all equations and a_t from its scale. Attention that
    is nearly uniform adds the average of all tokens to each: two directions over the tokens, p and
    q, are coupled through K, so that one dense matrix of 2 r rows is enough.

    Args:
        scale: a_t^(-1/2), shape (patches, 1).
        plain: Cholesky factor of G, shape (r, r).
        pair: Orthonormal basis of p and q, shape (patches, 2).
        coupled: Cholesky factor over pair and r, shape (2 r, 2 r).
    """

    scale: Tensor
    plain: Tensor
    pair: Tensor
    coupled: Tensor

    @staticmethod
    def of(equations: BlockEquations, c: Tensor, weights: Weights) -> Preconditioner:
        """Build it at `c`."""
        own, into = len(equations.prefix), equations.into
        unknowns, folded = into.shape[1], equations.early.outside.numel()
        charge(products=24.0 * unknowns**3 + 8.0 * folded * len(into))
        z, h = (stream[own:] for stream in equations.streams(c))
        plain = 1 / z.std(1, unbiased=False)
        early, late = plain * weights[0], weights[1] / h.std(1, unbiased=False)
        own_early = equations.early.folded().T @ into
        own_late = equations.late.folded().T @ into
        first, second = own_early.T @ own_early, own_late.T @ own_late
        gram = early.square().mean() * first + late.square().mean() * second
        size = early.square() * first.trace() + late.square() * second.trace()
        scale = (size / size.mean()).rsqrt()[:, None]
        norm = equations.early.norm
        value = equations.attention.weight[-len(into) :] * norm.scale
        value = value - value.mean(1, keepdim=True)
        average = equations.late.folded().T @ (equations.project @ (value @ into))
        both = torch.cat(
            [late.square()[:, None] * scale, plain[:, None] * scale / (len(c) + own)], 1
        )
        pair, mix = torch.linalg.qr(both)
        p, q = mix[:, 0], mix[:, 1]
        cross = own_late.T @ average
        dense = torch.kron(torch.eye(2).to(gram), gram)
        dense = dense + torch.kron(torch.outer(p, q), cross)
        dense = dense + torch.kron(torch.outer(q, p), cross.T.contiguous())
        power = late.square().sum() * (average.T @ average)
        dense = dense + torch.kron(torch.outer(q, q), power)
        return Preconditioner(scale, _root(gram), pair, _root(dense))

    def up(self, u: Tensor) -> Tensor:
        """Map free variables to c."""
        return self.scale * self._solve(u, transpose=True)

    def down(self, gradient: Tensor) -> Tensor:
        """Map a gradient by c to one by the free variables: the adjoint of `up`."""
        return self._solve(self.scale * gradient, transpose=False)

    def _solve(self, u: Tensor, *, transpose: bool) -> Tensor:
        inside = self.pair.T @ u
        charge(products=2.0 * len(u) * u.shape[1] ** 2 + 8.0 * u.shape[1] ** 2, calls=8)
        alone = _triangular(self.plain, u - self.pair @ inside, transpose)
        joint = _triangular(self.coupled, inside.reshape(1, -1), transpose)
        return alone + self.pair @ joint.reshape(inside.shape)


def _root(matrix: Tensor) -> Tensor:
    lift = 1e-10 * matrix.diagonal().amax() * torch.eye(len(matrix)).to(matrix)
    factor, failed = torch.linalg.cholesky_ex(matrix + lift)
    if int(failed):
        values, vectors = torch.linalg.eigh(matrix)
        values = values.clamp_min(1e-8 * values[-1])
        factor = torch.linalg.cholesky((vectors * values) @ vectors.T)
    return factor


def _triangular(factor: Tensor, rows: Tensor, transpose: bool) -> Tensor:
    left = factor.T if transpose else factor
    return torch.linalg.solve_triangular(left, rows.T, upper=transpose).T
