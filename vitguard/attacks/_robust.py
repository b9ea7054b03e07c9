"""Maximum a posteriori solutions of the closed forms, for gradients that are not exact.

An image prior replaces the missing digits: photos vary little between neighbouring pixels, so the
prior energy is |D x|^2 + tau |x|^2 with D the pixel differences and x in model-input units. With a
linear observation A x = y of known structure the estimate minimises |A x - y|^2 + lambda prior(x),
solved by conjugate gradients over the whole image (docs/methods.md 2.5c, 4.5).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks._mlp import Norm
from vitguard.attacks._spans import Embedding, block_rows, patch_gradient
from vitguard.core import View
from vitguard.errors import Blocked
from vitguard.vit import Anatomy

__all__ = ["conjugate_gradients", "position_problem", "span_problem"]

_FLATNESS = 1e-2  # tau: how much a pixel's own size counts against its differences

Operator = Callable[[Tensor], Tensor]


def conjugate_gradients(
    operator: Operator, right: Tensor, *, iterations: int = 200, tolerance: float = 1e-8
) -> Tensor:
    """Solve operator(x) = right for a symmetric positive operator, from x = 0."""
    x, r = torch.zeros_like(right), right.clone()
    p, power = r.clone(), r.square().sum()
    goal = tolerance**2 * power
    for _ in range(iterations):
        if not bool(power > goal):
            break
        q = operator(p)
        step = power / (p * q).sum()
        x, r = x + step * p, r - step * q
        new = r.square().sum()
        p, power = r + (new / power) * p, new
    return x


def prior_operator(anatomy: Anatomy) -> Operator:
    """Return x -> D^T D x + tau x on patches, shape (patches, pixels)."""

    def apply(patches: Tensor) -> Tensor:
        image = anatomy.unpatchify(patches)
        out = _FLATNESS * image
        for dim in (-2, -1):
            jump = image.diff(dim=dim)
            ahead = torch.zeros_like(image)
            ahead.narrow(dim, 1, jump.shape[dim]).add_(jump)
            ahead.narrow(dim, 0, jump.shape[dim]).sub_(jump)
            out = out + ahead
        return anatomy.patchify(out)

    return apply


def position_problem(view: View, anatomy: Anatomy) -> Callable[[float], Tensor]:
    """Return lambda -> the patches X that minimise |G^T X - dL/dW|^2 + lambda |G|^2 prior(X).

    Raises:
        Blocked: The gradient of positions or patches cannot be read.
    """
    if anatomy.positions is None:
        raise Blocked("positions", "the model has none")
    rows = view.read(anatomy.positions)[0, anatomy.position_prefix :]
    normal, right = rows @ rows.T, rows @ patch_gradient(view, anatomy)
    scale, prior = normal.diagonal().mean(), prior_operator(anatomy)

    def solve(weight: float) -> Float[Tensor, "patches pixels"]:
        return conjugate_gradients(lambda x: normal @ x + weight * scale * prior(x), right)

    return solve


def span_problem(view: View, anatomy: Anatomy) -> Callable[[float, float], Tensor]:
    """Return (softness, lambda) -> patches, from the rows of query, key and value.

    Every right singular vector v_k of the rows gives one equation v_k^T [LN(z); 1] = 0, weighted by
    1 / (1 + (value_k / (softness value_1))^2): directions that the gradient shows clearly say
    nothing, the others say that a token is orthogonal to them. Unknowns per patch: x and the
    standard deviation s of its token, kept near the one of a mid-grey patch.

    Raises:
        Blocked: The gradient of query, key and value cannot be read.
    """
    block, embedding = anatomy.blocks[0], Embedding.of(view, anatomy)
    rows = block_rows(view, block)
    norm = Norm.of(view, block.norm1)
    matrix = rows.matrix
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R
    _, values, vectors = torch.linalg.svd(matrix, full_matrices=True)
    values = torch.cat([values, values.new_zeros(len(vectors) - len(values))])
    inner = vectors[:, : anatomy.width]
    last = vectors[:, anatomy.width] if rows.augmented else 0.0
    weighted = inner * norm.scale
    weighted = weighted - weighted.mean(1, keepdim=True)
    into = torch.cat([weighted @ embedding.weight, (inner @ norm.shift + last)[:, None]], 1)
    target = -embedding.offset @ weighted.T  # patches, equations
    usual = embedding.offset.std(dim=1, unbiased=False).mean()
    usual = (usual.square() + embedding.weight.std(dim=0).square().sum()).sqrt()
    prior, pixels = prior_operator(anatomy), anatomy.patch_pixels

    def solve(softness: float, weight: float) -> Float[Tensor, "patches pixels"]:
        trust = 1 / (1 + (values / (softness * values[0])).square())
        system = into * trust[:, None]
        normal = system.T @ system
        scale = normal.diagonal()[:pixels].mean()
        pull = weight * normal[-1, -1].clamp_min(1e-12) * 1e-2
        right = (target * trust) @ system
        right[:, -1] += pull * usual

        def operator(y: Tensor) -> Tensor:
            out = y @ normal
            out[:, :pixels] += weight * scale * prior(y[:, :pixels])
            out[:, -1] += pull * y[:, -1]
            return out

        # s and x differ in size: a diagonal change of variables evens them out.
        even = (normal.diagonal() + 1e-3 * scale).rsqrt()
        y = conjugate_gradients(lambda v: operator(v * even) * even, right * even, iterations=400)
        return (y * even)[:, :pixels]

    return solve
