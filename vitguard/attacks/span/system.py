"""The linear system of span inversion: what the first block's spans say of every patch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.attacks.equations.mask import shuffled_count
from vitguard.attacks.equations.places import SAME_EQUATIONS, all_alike, crowds
from vitguard.attacks.equations.rows import (
    Embedding,
    Rows,
    block_rows,
    layer_rows,
    patch_basis,
    require_rank,
    right_vectors,
    row_basis,
)
from vitguard.core import View
from vitguard.errors import Blocked, NotApplicable
from vitguard.vit import Anatomy

__all__ = ["System", "span_system"]


@dataclass(frozen=True)
class System:
    """The linear system A y = -Q^T [gamma * C offset; 0] that every position shares.

    Args:
        embedding: W, b + e_i and prefix tokens.
        basis: R, shape (pixels, r): x = R y[:r].
        constraint: Q^T with gamma and C folded in, shape (equations, width): applied to a token.
        left, values, right: Thin singular value decomposition of A, shape (equations, unknowns).
        rank: Numerical rank of A, known from the geometry of positions and patches.
        unseen: How many directions no equation sees if so many positions share the unknown one.
        shift: What the proj bias adds to every token (zero in the query-key-value form).
        source: `qkv` or `proj+fc1`.
        reads_patch: Whether R comes from the patch gradient.
    """

    embedding: Embedding
    basis: Tensor
    constraint: Tensor
    left: Tensor
    values: Tensor
    right: Tensor
    rank: int
    unseen: Callable[[int | None], int]
    shift: Tensor
    source: str
    reads_patch: bool

    def with_shuffled(self, count: int) -> System:
        """Return the same equations, with the rank they have if `count` positions are shuffled."""
        unknowns = self.right.shape[0]
        rank = max(1, min(len(self.values), unknowns - self.unseen(count)))
        return replace(self, rank=rank)

    def solve(
        self, offset: Float[Tensor, "patches width"]
    ) -> tuple[Float[Tensor, "patches unknowns"], Float[Tensor, " patches"]]:
        """Return the minimum-norm solutions for these offsets, and their relative residuals."""
        target = -(offset + self.shift) @ self.constraint.T
        along = target @ self.left[:, : self.rank]
        solution = (along / self.values[: self.rank]) @ self.right[:, : self.rank].T
        missed = target - along @ self.left[:, : self.rank].T
        return solution, missed.norm(dim=1) / target.norm(dim=1).clamp_min(1e-300)

    def patches(self, solution: Tensor) -> Float[Tensor, "patches pixels"]:
        """Return x = R c of each solution."""
        return solution[:, : self.basis.shape[1]] @ self.basis.T

    @property
    def null(self) -> Float[Tensor, "unknowns nullity"]:
        """Directions of the unknowns that no equation sees."""
        return self.right[:, self.rank :]

    @property
    def patch_null(self) -> Float[Tensor, "pixels nullity"]:
        """Those directions in pixels, orthonormal, where they move a patch at all."""
        moved = self.basis @ self.null[: self.basis.shape[1]]
        if not moved.shape[1]:
            return moved
        left, values, _ = torch.linalg.svd(moved, full_matrices=False)
        return left[:, values > 1e-9]

    def unknown_offset(self, view: View, anatomy: Anatomy, unknown: Tensor) -> Tensor:
        """Return b + u, the offset of a token under the shared unknown position u."""
        assert anatomy.positions is not None
        bias = self.embedding.offset - view.weight(anatomy.positions)[0, anatomy.position_prefix :]
        return bias[0] + unknown.detach().to(bias).flatten()


def span_system(view: View, anatomy: Anatomy) -> System:
    """Build the system from query-key-value rows, or from projection and fc1 without them.

    Under a shuffle as many positions are taken to share the unknown one as the settings allow,
    which may be more than there are.

    Raises:
        NotApplicable: See `SpanInversion`.
        Blocked: See `SpanInversion`.
    """
    anatomy.require_plain_embedding()
    if not anatomy.blocks or not anatomy.blocks[0].pre_norm:
        raise NotApplicable("the first block is not x + attention(norm(x))")
    if all_alike(crowds(Embedding.of(view, anatomy).offset), anatomy.patches):
        raise NotApplicable(SAME_EQUATIONS)
    try:
        return _system(view, anatomy, _qkv_form)
    except (Blocked, NotApplicable) as first:
        try:
            return _system(view, anatomy, _projection_form)
        except (Blocked, NotApplicable):
            raise first from None


@dataclass(frozen=True)
class _Form:
    """One reading of the block: rows that constrain norm(h), and the free directions of h."""

    rows: Rows
    norm: str
    free: Tensor
    shift: Tensor
    tokens: int
    source: str


def _qkv_form(view: View, anatomy: Anatomy, embedding: Embedding) -> _Form:
    block = anatomy.blocks[0]
    nothing = embedding.weight.new_zeros(anatomy.width, 0)
    tokens = view.update.batch_size * anatomy.patches + anatomy.prefix_tokens
    zero = embedding.weight.new_zeros(anatomy.width)
    return _Form(block_rows(view, block), block.norm1, nothing, zero, tokens, "qkv")


def _projection_form(view: View, anatomy: Anatomy, embedding: Embedding) -> _Form:
    block = anatomy.blocks[0]
    tokens = view.update.batch_size * anatomy.tokens
    rows = layer_rows(view, block.fc1)
    outputs = row_basis(view.read(f"{block.proj}.weight"), tokens)
    scale = view.weight(block.scale1) if block.scale1 else embedding.weight.new_ones(anatomy.width)
    free = scale[:, None] * (view.weight(f"{block.proj}.weight") @ outputs)
    shift = scale * view.bias(block.proj)
    return _Form(rows, block.norm2, free, shift, tokens, "proj+fc1")


def _system(view: View, anatomy: Anatomy, form_of: Any) -> System:
    embedding = Embedding.of(view, anatomy)
    form: _Form = form_of(view, anatomy, embedding)
    if form.tokens >= anatomy.width:
        raise NotApplicable(
            f"{form.tokens} tokens fill the {anatomy.width} dimensions: no equation is left"
        )
    basis = patch_basis(view, anatomy)
    reads_patch = basis is not None
    if basis is None:
        unknowns = anatomy.patch_pixels + form.free.shape[1] + 1
        if anatomy.width - form.tokens < unknowns:
            raise Blocked(
                anatomy.patch_weight,
                view.update.sealed.get(anatomy.patch_weight, "it is not in the update")
                + f"; without it {unknowns} unknowns have {anatomy.width - form.tokens} equations",
            )
        basis = torch.eye(anatomy.patch_pixels, dtype=torch.float64).to(embedding.weight)
    strengths, vectors = right_vectors(form.rows.matrix, form.tokens)
    same = _same_tokens(view, anatomy, strengths, form)
    outside = vectors[:, form.tokens - same :]
    gamma = view.weight(f"{form.norm}.weight")
    beta = view.bias(form.norm)
    across = outside[: anatomy.width]
    constraint = (gamma[:, None] * across).T
    if anatomy.blocks[0].centred:
        constraint = constraint - constraint.mean(dim=1, keepdim=True)  # Q^T diag(gamma) C
    moves = torch.cat([embedding.weight @ basis, form.free], dim=1)
    columns = [constraint @ moves]
    deviation = across.T @ beta
    if form.rows.augmented:
        columns.append((deviation + outside[-1])[:, None])
    elif bool(beta.any()):
        columns.append(deviation[:, None])
    charge(products=2.0 * constraint.numel() * moves.shape[1])
    charge(svd=len(constraint) * (moves.shape[1] + 1) * min(len(constraint), moves.shape[1] + 1))
    left, values, right = torch.linalg.svd(torch.cat(columns, dim=1), full_matrices=False)

    def unseen(shuffled: int | None) -> int:
        return max(_nullity(view, anatomy, embedding, moves, form, shuffled) - same, 0)

    rank = max(1, min(len(values), right.shape[1] - unseen(None)))
    return System(
        embedding, basis, constraint, left, values, _full(right), rank, unseen, form.shift,
        form.source, reads_patch,
    )  # fmt: skip


def _same_tokens(view: View, anatomy: Anatomy, strengths: Tensor, form: _Form) -> int:
    """Return how many tokens repeat others: equal patches under one unknown position (flat sky).

    Raises:
        NotApplicable: Fewer directions than tokens, for another reason.
    """
    try:
        require_rank(strengths, form.tokens, form.rows.names[0])
    except NotApplicable:
        strengths = strengths[: form.tokens].clamp_min(torch.finfo(strengths.dtype).tiny)
        same = form.tokens - 1 - int((strengths[:-1] / strengths[1:]).argmax())
        if view.unknown is None or view.update.batch_size > 1:
            raise
        if same >= shuffled_count(view, anatomy)[0]:
            raise
        return same
    return 0


def _nullity(
    view: View, anatomy: Anatomy, embedding: Embedding, moves: Tensor, form: _Form,
    shuffled: int | None,
) -> int:  # fmt: skip
    """Return how many directions the equations cannot see, from what is public.

    A combination of true tokens lies in the span whatever Q is. It is mistaken for a patch where
    its offsets cancel: the nullity is T - rank((I - P) O), with O the offsets of all T tokens and
    P the projection on what a patch (and attention output) can be. T tokens of which several
    share an offset (images of a batch, shuffled patches under one unknown position) lower the rank.
    """
    offsets = embedding.offset + form.shift
    unknown = view.unknown
    extra = view.update.batch_size * anatomy.patches - anatomy.patches
    if unknown is not None:
        count = shuffled_count(view, anatomy)[0] if shuffled is None else shuffled
        shared = max(count - 1, 0)
        offsets = offsets[shared:]
        extra += shared
    # a prefix token is one known vector where it enters unchanged
    known = embedding.prefix if form.source == "qkv" else offsets[:0]
    rows = torch.cat([offsets, known])
    if anatomy.blocks[0].centred:
        rows = rows - rows.mean(dim=1, keepdim=True)
        moves = moves - moves.mean(dim=0, keepdim=True)
    charge(qr=2 * moves.numel() * moves.shape[1], svd=0.4 * rows.numel() * min(rows.shape))
    span = torch.linalg.qr(moves).Q
    rest = rows - (rows @ span) @ span.T
    scale = torch.linalg.matrix_norm(rows, 2).clamp_min(1e-300)
    rank = int((torch.linalg.svdvals(rest) > 1e-6 * scale).sum())
    return extra + len(rows) - rank


def _full(right: Tensor) -> Tensor:
    """Complete the right singular vectors, as columns, to a basis of the unknowns."""
    charge(svd=right.shape[1] ** 3 if right.shape[0] < right.shape[1] else 0)
    return (
        torch.linalg.svd(right, full_matrices=True).Vh.T
        if right.shape[0] < right.shape[1]
        else right.T
    )
