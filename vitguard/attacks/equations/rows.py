"""Row spaces of gradients: what a linear layer's gradient says about its inputs.

dL/dW = sum_t d_t a_t^T for a linear layer y = W a + b over tokens t, so the rows of the gradient
span the layer's inputs, and those of [dL/dW | dL/db] span [a_t; 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.core import AffineSpace, Guess, View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy, Block

__all__ = [
    "Embedding",
    "LeastSquares",
    "Rows",
    "block_rows",
    "complement",
    "guess_from_patches",
    "layer_rows",
    "least_squares",
    "patch_basis",
    "patch_gradient",
    "position_gradient",
    "require_rank",
    "right_vectors",
    "row_basis",
    "whitened",
]


@dataclass(frozen=True)
class Embedding:
    """The public part of z_i = W x_i + b + e_i, in float64.

    Args:
        weight: W, shape (width, pixels per patch).
        offset: b + e_i, shape (patches, width).
        prefix: Prefix tokens as they enter the first block, shape (prefix tokens, width).
    """

    weight: Float[Tensor, "width pixels"]
    offset: Float[Tensor, "patches width"]
    prefix: Float[Tensor, "prefix width"]

    @staticmethod
    def of(view: View, anatomy: Anatomy) -> Embedding:
        """Read the embedding from the public model."""
        weight = view.weight(anatomy.patch_weight).flatten(1)
        bias = view.bias(anatomy.patch_weight.rpartition(".")[0])
        tokens = [view.weight(name)[0] for name in anatomy.prefix] if anatomy.prefix_tokens else []
        prefix = torch.cat(tokens) if tokens else weight.new_zeros(0, weight.shape[0])
        offset = weight.new_zeros(anatomy.patches, weight.shape[0]) + bias
        if anatomy.positions is not None:
            positions = view.weight(anatomy.positions)[0]
            if positions.shape[0] - anatomy.position_prefix != anatomy.patches:
                raise NotApplicable("positions are resampled in the forward pass")
            offset = offset + positions[anatomy.position_prefix :]
            if anatomy.position_prefix:
                prefix = prefix + positions[: anatomy.position_prefix]
        return Embedding(weight, offset, prefix)


def patch_gradient(view: View, anatomy: Anatomy) -> Float[Tensor, "width pixels"]:
    """Return dL/dW of the patch embedding with each filter as a row."""
    return view.read(anatomy.patch_weight).flatten(1)


def position_gradient(view: View, anatomy: Anatomy) -> Float[Tensor, "patches width"]:
    """Return dL/de of the patches' positions, at the scale of the patch embedding's gradient.

    Where each layer has a factor of its own (`Traits.layerwise`), that of the positions over that
    of the patch embedding follows from dL/db = sum_i dL/de_i.

    Raises:
        NotApplicable: Positions are resampled, or nothing tells that factor.
        Blocked: The gradient cannot be read.
    """
    assert anatomy.positions is not None
    seen = view.read(anatomy.positions)[0, anatomy.position_prefix :]
    if seen.shape[0] != anatomy.patches:
        raise NotApplicable("positions are resampled in the forward pass")
    if not view.traits.layerwise:
        return seen
    if not view.update.can_read(anatomy.patch_bias):
        raise NotApplicable(
            "each layer has a factor of its own, and no bias of the patch embedding tells that of "
            "the positions"
        )
    total, bias = seen.sum(0), view.read(anatomy.patch_bias)
    return seen * (bias @ total / total.square().sum().clamp_min(1e-300))


def guess_from_patches(
    view: View,
    anatomy: Anatomy,
    patches: Float[Tensor, "*guessed patches pixels"],
    *,
    labels: Tensor | None = None,
    verified: Tensor | None = None,
    shuffled: Tensor | None = None,
    space: AffineSpace | None = None,
    details: Mapping[str, Any] | None = None,
) -> Guess:
    """Return the guess whose images these patches (model-input units) make.

    Raises:
        NotApplicable: The solution is not finite.
    """
    if not bool(patches.isfinite().all()):
        raise NotApplicable("the update is not finite, and so is its solution")
    patches = patches if patches.dim() == 3 else patches[None]
    images = view.normalization.invert(anatomy.unpatchify(patches))
    return Guess(
        images=images.clamp(0, 1),
        labels=labels,
        verified=verified,
        shuffled=shuffled,
        space=space,
        details=details or {},
    )


class LeastSquares(NamedTuple):
    """The minimum-norm solution of a linear system in the sense of least squares.

    Args:
        solution: Shape (unknowns, columns).
        rank: Of the system.
        residual: Frobenius norm of what the solution leaves of the target.
    """

    solution: Float[Tensor, "unknowns columns"]
    rank: int
    residual: float


def least_squares(
    system: Float[Tensor, "equations unknowns"], target: Float[Tensor, "equations columns"]
) -> LeastSquares:
    """Solve a linear system of any rank.

    Raises:
        NotApplicable: System or target is not finite.
    """
    if not bool(system.isfinite().all() and target.isfinite().all()):
        raise NotApplicable("the update is not finite")
    # the one LAPACK driver that tells the rank and takes deficient systems runs on the CPU only
    charge(svd=system.numel() * min(system.shape), products=4.0 * system.numel() * target.shape[1])
    fit = torch.linalg.lstsq(system.cpu(), target.cpu(), driver="gelsd")
    solution = fit.solution.to(target.device)
    if fit.residuals.numel():  # of full rank with equations to spare, the solver knows it
        left = fit.residuals.sum().sqrt()
    else:
        left = torch.addmm(target, system, solution, beta=-1).norm()
    return LeastSquares(solution, int(fit.rank), float(left))


def whitened(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Scale each row to unit norm.

    The row space stays; rounding errors, which are relative to each row, become alike. Worth 10
    to 18 dB on a float32 gradient, whose query and key rows are far smaller than its value rows.
    """
    norms = matrix.norm(dim=1, keepdim=True)
    return matrix / torch.where(norms > 0, norms, torch.ones_like(norms))


def right_vectors(
    matrix: Float[Tensor, "rows columns"], rank: int
) -> tuple[Float[Tensor, " values"], Float[Tensor, "columns columns"]]:
    """Return singular values and all right singular vectors (as columns), strongest first.

    Rows are whitened unless the gap behind `rank` says that the noise does not follow the rows
    (added noise, for instance).
    """
    if not bool(matrix.isfinite().all()):
        raise NotApplicable("the update is not finite")
    candidates = []
    for rows in (whitened(matrix), matrix):
        charge(qr=rows.numel() * min(rows.shape), svd=min(rows.shape) * rows.shape[1] ** 2)
        rows = torch.linalg.qr(rows, mode="r").R if rows.shape[0] > rows.shape[1] else rows
        _, values, vectors = torch.linalg.svd(rows, full_matrices=True)
        if not 0 < rank < len(values):
            return values, vectors.T
        gap = float(values[rank - 1] / values[rank].clamp_min(torch.finfo(values.dtype).tiny))
        candidates.append((gap, values, vectors.T))
        if gap > 4:
            break
    _, values, vectors = max(candidates, key=lambda candidate: candidate[0])
    return values, vectors


def require_rank(values: Float[Tensor, " values"], rank: int, what: str) -> None:
    """Raise NotApplicable if singular values end well before `rank`.

    Tokens that receive no gradient of their own (the last block under class-token pooling) leave
    fewer directions than tokens: a cliff of a factor 1000 before `rank`, and none at it.
    """
    values = values.clamp_min(torch.finfo(values.dtype).tiny)
    steps = values[:-1] / values[1:]
    if not 0 < rank <= len(steps) or steps[rank - 1] > 10:
        return
    cliff = int(steps[:rank].argmax())
    if steps[cliff] > 1e3:
        raise NotApplicable(
            f"the gradient of {what} has rank {cliff + 1}, not one direction for each of {rank} "
            "tokens"
        )


def row_basis(matrix: Float[Tensor, "rows columns"], rank: int) -> Float[Tensor, "columns rank"]:
    """Return an orthonormal basis of the `rank` strongest directions of the row space."""
    return right_vectors(matrix, rank)[1][:, : min(rank, *matrix.shape)]


def complement(matrix: Float[Tensor, "rows columns"], rank: int) -> Float[Tensor, "columns rest"]:
    """Return an orthonormal basis of the directions orthogonal to the `rank` strongest ones."""
    return right_vectors(matrix, rank)[1][:, rank:]


def patch_basis(view: View, anatomy: Anatomy) -> Float[Tensor, "pixels rank"] | None:
    """Return a basis R of the patches' span, None where the patch gradient cannot be read."""
    if not view.update.can_read(anatomy.patch_weight):
        return None
    rank = min(view.update.batch_size * anatomy.patches, anatomy.patch_pixels, anatomy.width)
    return row_basis(patch_gradient(view, anatomy), rank)


@dataclass(frozen=True)
class Rows:
    """Gradient rows of a linear layer.

    Args:
        matrix: dL/dW, or [dL/dW | dL/db] where `augmented`; shape (outputs, inputs [+ 1]).
        names: The tensors that were read.
    """

    matrix: Tensor
    augmented: bool
    names: tuple[str, ...]


def layer_rows(view: View, module: str) -> Rows:
    """Return the rows of one linear layer; without its bias where that cannot be read.

    Raises:
        Blocked: The weight gradient cannot be read.
    """
    return _augment(view, (f"{module}.weight",), (f"{module}.bias",))


def block_rows(view: View, block: Block) -> Rows:
    """Return the rows of a block's query, key and value projection, or of those that are sent.

    All three see the same tokens: where they are layers of their own, query or value alone will do.

    Raises:
        Blocked: No weight gradient can be read.
    """
    readable = tuple(name for name in block.qkv if view.update.can_read(name))
    if not readable or readable == block.qkv:
        return _augment(view, block.qkv, block.qkv_bias)
    layers = {name.rpartition(".")[0] for name in readable}
    biases = tuple(name for name in block.qkv_bias if name.rpartition(".")[0] in layers)
    return _augment(view, readable, biases)


def _augment(view: View, weights: tuple[str, ...], biases: tuple[str, ...]) -> Rows:
    if not weights:
        raise NotApplicable("the layer's weight has no known name")
    matrix = torch.cat([view.read(w) for w in weights])
    readable = [b for b in biases if view.update.can_read(b)]
    outputs = sum(view.read(b).numel() for b in readable)
    if readable and outputs == matrix.shape[0]:
        bias = torch.cat([view.read(b) for b in readable])
        return Rows(torch.cat([matrix, bias[:, None]], 1), True, (*weights, *readable))
    return Rows(matrix, False, weights)
