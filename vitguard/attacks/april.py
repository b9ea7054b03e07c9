"""APRIL in closed form: exact where attention reads the embedded sequence itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vitguard.attacks.base import Attack
from vitguard.attacks.equations.rows import (
    Embedding,
    guess_from_patches,
    least_squares,
    patch_basis,
)
from vitguard.attacks.labels import try_labels
from vitguard.core import Guess, View
from vitguard.errors import NotApplicable
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy

__all__ = ["April"]


@dataclass(frozen=True)
class April(Attack):
    """Recover the embedded sequence from attention and position gradients, then the pixels.

    Where the first attention block reads z itself and nothing else does, at batch size 1,

        (dl/dz) z^T = Q^T dl/dQ + K^T dl/dK + V^T dl/dV,    dl/dz = dl/dE_pos,

    is linear in z, and x = W^+ (z - e - b). Where a patch has more pixels than the token has
    dimensions, x is sought in the row space of the patch gradient.

    Raises:
        NotApplicable: A norm before the attention or a residual around it (every usual ViT), more
            than one image, no learnable positions over all tokens, layers that were clipped one by
            one.
        Blocked: An attention or position gradient is not in the update.

    References:
        arXiv 2112.14087, theorem 1; docs/methods.md 2.2.
    """

    name: ClassVar[str] = "april"
    family: ClassVar[str] = "closed-form"

    def remains(self, plain: Released) -> tuple[Remaining, ...]:
        """Possible where attention reads the embedded sequence itself, and is plain."""
        a = plain.anatomy
        block = a.blocks[0] if a.blocks else None
        if block is None or block.pre_norm or block.residual:
            why = "a norm before the first attention or a residual around it: the identity fails"
            return (Remaining(self.name, False, (), why),)
        if a.positions is None:
            return (Remaining(self.name, False, (), "no absolute position embedding"),)
        if plain.batch_size > 1:
            return (Remaining(self.name, False, (), "it needs an update of one image"),)
        patch = (a.patch_weight,) if a.patch_pixels > a.width else ()
        needs = (a.positions, *block.qkv, *patch)
        return (
            plain.verdict(self.name, needs, "", "attention reads the embedded sequence itself"),
        )

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return one image."""
        anatomy = Anatomy.of(view.model)
        anatomy.require_plain_embedding()
        if not anatomy.blocks:
            raise NotApplicable("no attention block is known")
        block = anatomy.blocks[0]
        if block.pre_norm or block.residual:
            raise NotApplicable(
                "the first block has a norm before its attention or a residual around it; "
                "the identity holds without both"
            )
        view = view.gradient()
        if view.update.batch_size > 1:
            raise NotApplicable(f"needs one image, got a batch of {view.update.batch_size}")
        if anatomy.positions is None or anatomy.position_prefix != anatomy.prefix_tokens:
            raise NotApplicable("needs learnable positions for every token")
        if view.traits.layerwise:
            raise NotApplicable("each layer has a factor of its own, which nobody knows")
        slope = view.read(anatomy.positions)[0]
        product = sum(view.weight(name).T @ view.read(name) for name in block.qkv)
        assert isinstance(product, torch.Tensor)
        sequence = least_squares(slope.T, product).solution
        residual = float((slope.T @ sequence - product).norm() / product.norm().clamp_min(1e-300))
        embedding = Embedding.of(view, anatomy)
        target = sequence[anatomy.prefix_tokens :] - embedding.offset
        basis = torch.eye(anatomy.patch_pixels).to(embedding.weight)
        if anatomy.patch_pixels > anatomy.width:
            basis = patch_basis(view, anatomy)
            if basis is None:
                view.read(anatomy.patch_weight)
        assert basis is not None
        inverse = torch.linalg.pinv(embedding.weight @ basis)
        return guess_from_patches(
            view,
            anatomy,
            target @ inverse.T @ basis.T,
            labels=try_labels(view, generator),
            details={"residual": residual},
        )
