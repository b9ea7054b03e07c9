"""The affine family of tokens that the linear span equations leave at each position.

Unknowns at one position: y = (c, d, s, s1) with patch x = R c, attended values o = O d, and the
standard deviations s and s1 in front of fc1 and of qkv. With R, O bases of the rows of dL/dW of the
patch embedding and of the attention projection, and Q1, Q0 complements of the rows of fc1 and qkv,

    h = W R c + Wo O d + b + bo + e_i,   Q1^T [gamma2 * C h + s beta2 ; s] = 0,
    z = W R c + b + e_i,                 Q0^T [gamma1 * C z + s1 beta1; s1] = 0     (C centres)

is linear, with one matrix for all positions (docs/methods.md 2.4 and 2.4b, step 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.attacks.equations.mlp import Norm, thin_basis
from vitguard.attacks.equations.rows import (
    Embedding,
    Rows,
    block_rows,
    complement,
    layer_rows,
    patch_basis,
)
from vitguard.attacks.equations.steps import directions
from vitguard.core import View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy, Block

__all__ = ["Family", "Frame", "Solver", "projection"]


@dataclass(frozen=True)
class Family:
    """Tokens y = origin_i + directions v of first-block quantities, v of k directions.

    Args:
        origin: Minimum-norm solutions, shape (positions, unknowns).
        directions: Orthonormal after scaling by `columns`, shape (unknowns, k).
        columns: Column norms of the system, shape (unknowns,).
        misfit: Relative residual of the linear system at each position.
    """

    origin: Float[Tensor, "positions unknowns"]
    directions: Float[Tensor, "unknowns k"]
    columns: Float[Tensor, " unknowns"]
    misfit: Float[Tensor, " positions"]

    def to(self, dtype: torch.dtype) -> Family:
        """Return the family in another precision."""
        return Family(*(getattr(self, f.name).to(dtype) for f in fields(self)))

    def at(
        self, positions: Tensor, v: Float[Tensor, "starts k"]
    ) -> Float[Tensor, "starts unknowns"]:
        """Return the unknowns y of coordinates v."""
        return self.origin[positions] + v @ self.directions.T

    def coordinates(
        self, positions: Tensor, y: Float[Tensor, "starts unknowns"]
    ) -> Float[Tensor, "starts k"]:
        """Return the coordinates of the member nearest to y."""
        gap = (y - self.origin[positions]) * self.columns
        return gap @ (self.directions * self.columns[:, None])


@dataclass(frozen=True)
class Solver:
    """The factorised system, which gives a family for any number k of free directions.

    Args:
        patch: R, shape (pixels, r).
        attended: O, shape (width, T).
        stream: d h / d (c, d), shape (width, r + T).
        offset: b + bo + e_i, shape (positions, width).
        project_bias: bo, shape (width,).
        nullity: Directions that no equation can see, known from the geometry.
        values: Singular values of the column-scaled system, one per unknown.
    """

    patch: Tensor
    attended: Tensor
    stream: Tensor
    offset: Tensor
    project_bias: Tensor
    nullity: int
    values: Tensor
    columns: Tensor
    right_side: Tensor
    left: Tensor
    right: Tensor

    @property
    def scale_index(self) -> int:
        """Index of s among the unknowns."""
        return self.stream.shape[1]

    def free(self, tolerance: float) -> int:
        """Return how many directions the equations determine worse than `tolerance`."""
        weak = int((self.values < tolerance * self.values[0]).sum())
        return max(weak, min(self.nullity, len(self.values) - 1))

    def family(self, k: int) -> Family:
        """Leave the k weakest directions free and solve for the rest."""
        kept = len(self.values) - k
        charge(products=6.0 * self.right_side.shape[0] * self.left.numel(), calls=12)
        inverse = self.right_side @ self.left[:, :kept] / self.values[:kept]
        scaled = -inverse @ self.right[:kept]
        explained = (inverse * self.values[:kept]) @ self.left[:, :kept].T
        misfit = (self.right_side - explained).norm(dim=1) / self.right_side.norm(dim=1)
        return Family(
            scaled / self.columns, (self.right[kept:] / self.columns).T, self.columns, misfit
        )

    def positions_apart(self, family: Family, rows: Tensor | None = None) -> float:
        """Return how far the members of one position stay outside those of another.

        Of the nearest two positions, or two of `rows`, relative to the centred stream h. Near 0 a
        true token of one position is a member at another, and the MLP's equations, which know no
        position, cannot refuse it there.
        """
        index = self.scale_index
        rows = torch.arange(len(self.offset)).to(self.offset.device) if rows is None else rows
        stream = family.origin[rows, :index] @ self.stream.T + self.offset[rows]
        size = (stream - stream.mean(1, keepdim=True)).norm(dim=1).mean()
        first = torch.cat([stream, family.origin[rows, index : index + 1]], 1)
        moves = torch.cat([self.stream @ family.directions[:index],
                           family.directions[index : index + 1]])  # fmt: skip
        left, values, _ = torch.linalg.svd(moves, full_matrices=False)
        left = left[:, values > 1e-9 * values[0]]
        outside = first - (first @ left) @ left.T
        pairs = len(first) ** 2 // 2
        charge(svd=moves.numel() * moves.shape[1], elements=0.5 * pairs * first.shape[1])
        row, column = torch.triu_indices(len(first), len(first), 1, device=first.device)
        gap = (outside[row] - outside[column]).norm(dim=1)
        return float(gap.min() / size) if len(gap) else 1.0

    def pixels(self, y: Tensor) -> Float[Tensor, "tokens pixels"]:
        """Return the patches x = R c of unknowns y."""
        return y[:, : self.patch.shape[1]] @ self.patch.T

    def values_attended(self, y: Tensor) -> Float[Tensor, "tokens width"]:
        """Return o = O d of unknowns y."""
        return y[:, self.patch.shape[1] : self.scale_index] @ self.attended.T

    @staticmethod
    def of(frame: Frame, view: View, tokens: int, left: Tensor | None = None) -> Solver:
        """Set the system up for block 0.

        Args:
            frame: What is the same whichever tokens are known.
            view: Of the tokens that are left: what known ones put into fc1 and into the attention's
                projection is taken out.
            tokens: How many that are.
            left: Of them at each position, where that is known; shape (positions,).

        Raises:
            Blocked: The gradient of fc1 or of the attention projection cannot be read.
        """
        block, offset, into = frame.block, frame.offset + frame.bias, frame.into
        attended, _ = thin_basis(view.read(f"{block.proj}.weight"), tokens)
        stream = torch.cat([into, frame.project @ attended], 1)
        inner = _equations(layer_rows(view, block.fc1), frame.norm2, stream, offset, tokens, 0)
        parts = [inner]
        if frame.attention is not None:
            matrix, right = frame.attention
            zeros = matrix.new_zeros(len(matrix), attended.shape[1])
            pixels = into.shape[1]
            parts.append((torch.cat([matrix[:, :pixels], zeros, matrix[:, pixels:]], 1), right))
        nullity = frame.nullity(tokens, left)
        return _factorise(parts, frame.patch, attended, stream, offset, frame.bias, nullity)


@dataclass(frozen=True)
class Frame:
    """What the system of a view is made of that known tokens do not change.

    Args:
        offset: b + e_i; behind it the offsets that several tokens share (see `of`).
        patch: R.
        into: W R.
        project, bias: The attention's projection.
        attention: Equations of the spans of qkv over (c, s, s1), where they can be read.
    """

    block: Block
    embedding: Embedding
    offset: Tensor
    patch: Tensor
    into: Tensor
    project: Tensor
    bias: Tensor
    norm2: Norm
    attention: tuple[Tensor, Tensor] | None

    @staticmethod
    def of(
        view: View, anatomy: Anatomy, unknown: Tensor | None = None, together: Sequence[int] = ()
    ) -> Frame:
        """Read what known tokens do not change.

        Args:
            unknown: A shuffle's embeddings for positions, each a row more.
            together: Positions whose offset many tokens share, each a row more, the last ones.

        Raises:
            NotApplicable: The block is not of this form.
        """
        block, batch = anatomy.blocks[0], view.update.batch_size
        if not block.pre_norm:
            raise NotApplicable("the block has no norm in front of the attention")
        embedding = Embedding.of(view, anatomy)
        offset = embedding.offset
        if unknown is not None and anatomy.positions is not None:
            known = view.weight(anatomy.positions)[0, anatomy.position_prefix :]
            shared = (
                offset[:1] - known[:1] + unknown.detach().to(offset).reshape(-1, offset.shape[1])
            )
            offset = torch.cat([offset, shared])
        offset = torch.cat([offset, offset[list(together)]])
        patch = patch_basis(view, anatomy)
        pixels = anatomy.patch_pixels
        if patch is None or patch.shape[1] >= pixels:
            patch = torch.eye(pixels, dtype=offset.dtype, device=offset.device)
        project, bias = projection(view, anatomy)
        into, attention = embedding.weight @ patch, None
        if all(view.update.can_read(name) for name in block.qkv):
            shared = batch * anatomy.patches + anatomy.prefix_tokens
            most = min(view.update.local_steps * shared, anatomy.width - 1)
            shared = directions(view, block.qkv, shared, most)
            attention = _equations(
                block_rows(view, block), Norm.of(view, block.norm1), into, offset, shared, 1
            )
        norm2 = Norm.of(view, block.norm2)
        return Frame(block, embedding, offset, patch, into, project, bias, norm2, attention)

    def nullity(self, tokens: int, left: Tensor | None) -> int:
        """Return how many directions no equation can see, from what is public.

        A combination of the tokens that are left whose offsets cancel, up to what a patch can be,
        fits every span: T - rank((I - P) offsets). Rounding lifts these singular values, so a
        threshold misses them.
        """
        offset = self.embedding.offset
        offset = offset if left is None else self.offset[left > 0]
        offsets = torch.cat([offset, self.embedding.prefix])
        rows = offsets - offsets.mean(1, keepdim=True)
        charge(qr=2 * self.into.numel() * self.into.shape[1], svd=0.4 * rows.numel() * len(rows))
        moves = torch.linalg.qr(self.into - self.into.mean(0)).Q
        rest = rows - (rows @ moves) @ moves.T
        size = torch.linalg.matrix_norm(rows, 2).clamp_min(1e-300)
        rank = int((torch.linalg.svdvals(rest) > 1e-6 * size).sum())
        return max(tokens - rank, 0)


def projection(view: View, anatomy: Anatomy) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the attention's output projection, LayerScale folded in."""
    block = anatomy.blocks[0]
    weight = view.weight(f"{block.proj}.weight")
    bias = view.bias(block.proj)
    if block.scale1 is None:
        return weight, bias
    scale = view.weight(block.scale1)
    return scale[:, None] * weight, scale * bias


def _equations(
    rows: Rows, norm: Norm, stream: Tensor, offset: Tensor, tokens: int, which: int
) -> tuple[Tensor, Tensor]:
    """Matrix over (c, d, s, s1) and right-hand sides of one layer's span equations."""
    outside = complement(rows.matrix, min(tokens, *rows.matrix.shape))
    charge(products=2.0 * outside.numel() * (stream.shape[1] + len(offset)))
    inner = outside[:-1] if rows.augmented else outside
    scale = inner.T @ norm.shift + (outside[-1] if rows.augmented else 0.0)
    columns = torch.zeros_like(scale)[:, None].repeat(1, 2)
    columns[:, which] = scale
    weighted = inner * norm.scale[:, None]
    weighted = weighted - weighted.mean(0)  # C on the left: it is symmetric
    return torch.cat([weighted.T @ stream, columns], 1), offset @ weighted


def _factorise(
    parts: list[tuple[Tensor, Tensor]],
    patch: Tensor,
    attended: Tensor,
    stream: Tensor,
    offset: Tensor,
    project_bias: Tensor,
    nullity: int,
) -> Solver:
    matrix = torch.cat([m for m, _ in parts])
    right_side = torch.cat([r for _, r in parts], 1)
    if len(parts) == 1:
        matrix = matrix[:, :-1]
    columns = matrix.norm(dim=0)
    columns = columns.clamp_min(1e-9 * columns.max())
    small = min(matrix.shape)
    charge(qr=2 * matrix.numel() * small, svd=small * matrix.shape[1] ** 2)
    charge(products=2.0 * matrix.numel() * small)
    tall, small = torch.linalg.qr(matrix / columns)
    left, values, right = torch.linalg.svd(small)
    values = torch.cat([values, values.new_zeros(len(right) - len(values))])
    return Solver(
        patch=patch, attended=attended, stream=stream, offset=offset,
        project_bias=project_bias, nullity=nullity, values=values,
        columns=columns, right_side=right_side, left=tall @ left, right=right,
    )  # fmt: skip
