"""Span inversion: fixed positions do not hide an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks._base import Attack
from vitguard.attacks._smooth import smoothest
from vitguard.attacks._spans import (
    Embedding,
    Rows,
    block_rows,
    guess_from_patches,
    layer_rows,
    patch_basis,
    require_rank,
    right_vectors,
    row_basis,
)
from vitguard.attacks.labels import try_labels
from vitguard.core import AffineSpace, Guess, View
from vitguard.errors import Blocked, NotApplicable
from vitguard.vit import Anatomy

__all__ = ["SpanInversion", "System", "shuffled_positions", "span_system"]

_GAP = 3.0  # between the last singular value that counts and the first that does not


@dataclass(frozen=True)
class SpanInversion(Attack):
    """Solve for each patch from the span of the first block's inputs; no position gradient.

    The rows of [dL/dW_qkv | dL/db_qkv] of the first block span [LN(z_t); 1] over the T tokens.
    With Q a basis of the orthogonal complement, C centring, R a basis of the patches' span (rows
    of the patch gradient), x_i = R c_i and s the standard deviation of z_i,

        Q^T [ gamma * C(W R c + b + e_i) + s beta ; s ] = 0

    is linear in (c, s), with one factorisation for all positions. Where query, key and value
    cannot be read, the same is done one layer later with h_i = z_i + W_o o_i + b_o, o_i in the row
    space of dL/dW_o and LN2(h_i) in that of dL/dW_fc1. Without the patch gradient R is the
    identity, if the equations suffice.

    Where the solution is not unique the smoothest image of the affine space (the one of sparsest
    curvature) is returned, together with the space; under a shuffle the residual tells which
    positions were shuffled.

    Args:
        smooth_iterations: Conjugate-gradient iterations for the smoothest image, in each of its
            rounds.

    Raises:
        NotApplicable: No plain embedding or no pre-norm first block, or as many tokens as
            dimensions (T >= D), so that no equation is left.
        Blocked: What neither form can do without is not in the update.

    References:
        docs/methods.md 2.4.
    """

    name: ClassVar[str] = "span"
    family: ClassVar[str] = "closed-form"
    smooth_iterations: int = 30

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return one image, exact where `details["nullity"]` is 0 and the residual is small."""
        anatomy = Anatomy.of(view.model)
        view = view.gradient()
        unknown = view.extras.get("vitguard.shuffle.unknown")
        shuffled = None
        if unknown is None:
            system = span_system(view, anatomy)
            offset = system.embedding.offset
        else:
            system, shuffled = _fitted(view, anatomy)
            offset = system.embedding.offset.clone()
            offset[shuffled] = system.unknown_offset(view, anatomy, unknown)
        solution, residual = system.solve(offset)
        patches, null = system.patches(solution), system.patch_null
        space = None
        if null.shape[1]:
            space = AffineSpace(patches, null)
            patches = smoothest(
                space, anatomy, normalization=view.normalization, iterations=self.smooth_iterations
            )
        details: dict[str, Any] = {
            "from": system.source,
            "patch_gradient": system.reads_patch,
            "nullity": null.shape[1],
            "residual": float(residual.median()),
        }
        return guess_from_patches(
            view,
            anatomy,
            patches,
            labels=try_labels(view, generator),
            shuffled=None if shuffled is None else shuffled[None],
            space=space,
            details=details,
        )


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
    if anatomy.positions is None:
        raise NotApplicable("without absolute positions every patch has the same equations")
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
    shift = scale * _weight_or_zero(view, f"{block.proj}.bias", anatomy.width)
    return _Form(rows, block.norm2, free, shift, tokens, "proj+fc1")


def _fitted(view: View, anatomy: Anatomy) -> tuple[System, Tensor]:
    """Return the system under a shuffle, and which positions are shuffled.

    The settings say how many at most. A mask of rectangles, a warm-up or a probability leaves
    fewer, and each one fewer is one more equation. So the mask is read from the system in which
    nothing is shuffled: more directions than there are make no true position misfit. Then those
    that were found are counted. A position that was overlooked would make that last equation
    wrong: then no gap stands behind the larger rank, and what the settings say is taken.
    """
    at_most, exactly = _shuffled_count(view, anatomy)
    system = span_system(view, anatomy)
    plain = system.with_shuffled(0)
    residual = plain.solve(plain.embedding.offset)[1]
    shuffled = shuffled_positions(residual, at_most, exactly=exactly)
    found = int(shuffled.sum())
    if found >= at_most or view.update.batch_size > 1:
        return system, shuffled
    fitted = system.with_shuffled(found)
    values, rank = fitted.values, fitted.rank
    if rank < len(values) and values[rank - 1] < _GAP * values[rank]:
        return system, shuffled
    return fitted, shuffled


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
    beta = _weight_or_zero(view, f"{form.norm}.bias", anatomy.width)
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
        if "vitguard.shuffle.unknown" not in view.extras or view.update.batch_size > 1:
            raise
        if same >= _shuffled_count(view, anatomy)[0]:
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
    unknown = view.extras.get("vitguard.shuffle.unknown")
    extra = view.update.batch_size * anatomy.patches - anatomy.patches
    if unknown is not None:
        count = _shuffled_count(view, anatomy)[0] if shuffled is None else shuffled
        shared = max(count - 1, 0)
        offsets = offsets[shared:]
        extra += shared
    # a prefix token is one known vector where it enters unchanged
    known = embedding.prefix if form.source == "qkv" else offsets[:0]
    rows = torch.cat([offsets, known])
    if anatomy.blocks[0].centred:
        rows = rows - rows.mean(dim=1, keepdim=True)
        moves = moves - moves.mean(dim=0, keepdim=True)
    span = torch.linalg.qr(moves).Q
    rest = rows - (rows @ span) @ span.T
    scale = torch.linalg.matrix_norm(rows, 2).clamp_min(1e-300)
    rank = int((torch.linalg.svdvals(rest) > 1e-6 * scale).sum())
    return extra + len(rows) - rank


def shuffled_positions(
    residual: Float[Tensor, " patches"], at_most: int | None = None, *, exactly: bool = False
) -> Tensor:
    """Return which positions do not fit their own offset: the mask of a shuffle.

    True positions fit to rounding and shuffled ones do not, so the logarithms of the residuals
    fall into two groups; without a gap of a factor 10 between them nothing is called shuffled.

    Args:
        residual: Of each position under its own offset.
        at_most: How many the settings allow; then a gap of a factor 1.5 is enough.
        exactly: The settings say that it is just as many: the largest residuals are taken.
    """
    patches = len(residual)
    order = residual.clamp_min(1e-300).log10().sort().values
    at_most = patches if at_most is None else min(at_most, patches)
    if patches < 2 or at_most == 0:
        return torch.zeros_like(residual, dtype=torch.bool)
    if exactly:
        found = torch.zeros_like(residual, dtype=torch.bool)
        found[residual.topk(at_most).indices] = True
        return found
    gaps = order.diff()[patches - 1 - at_most if at_most < patches else 0 :]
    widest = int(gaps.argmax()) + (len(order) - 1 - len(gaps))
    if order.diff()[widest] < (1 if at_most == patches else 0.18):
        return torch.full_like(residual, bool(order.median() > -2), dtype=torch.bool)
    threshold = (order[widest] + order[widest + 1]) / 2
    return residual.clamp_min(1e-300).log10() > threshold


def _shuffled_count(view: View, anatomy: Anatomy) -> tuple[int, bool]:
    """Return how many positions of one image the settings shuffle at most, and whether exactly."""
    settings = view.settings.get("shuffle", {})
    count = int(float(settings.get("ratio", 1.0)) * anatomy.patches + 1e-9)
    exact = (
        settings.get("mask") == "uniform"
        and settings.get("probability") == 1
        and settings.get("schedule") == "constant"
        and not settings.get("warmup")
        and view.update.batch_size == 1
    )
    return count, exact


def _full(right: Tensor) -> Tensor:
    """Complete the right singular vectors, as columns, to a basis of the unknowns."""
    return (
        torch.linalg.svd(right, full_matrices=True).Vh.T
        if right.shape[0] < right.shape[1]
        else right.T
    )


def _weight_or_zero(view: View, name: str, width: int) -> Tensor:
    names = {n for n, _ in view.model.named_parameters()}
    if name in names:
        return view.weight(name)
    device = next(view.model.parameters()).device
    return torch.zeros(width, dtype=torch.float64, device=device)
