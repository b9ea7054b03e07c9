"""Where dummy images may lie: all pixels, or the affine space that something exact left over."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitguard.attacks.spectrum import filtered, frequencies
from vitguard.core import AffineSpace, View
from vitguard.errors import Blocked, NotApplicable
from vitguard.vit import Anatomy

__all__ = ["Subspace", "row_space"]

Images = Float[Tensor, "batch channels height width"]

_GAP = 1e-4
"""Singular values below this share of the largest are rounding, not patches (float32 gradients)."""


class Subspace:
    """The images a search may visit; every image where `space` is None.

    The free variable stays an image: what it decodes to is its projection, so that step sizes mean
    the same with and without a space.

    With a spectrum s > 0 the free variable is whitened: its Fourier coefficients are divided by
    frequency^s, as those of photos are for s = 1. Coarse shapes then cost an optimizer no more
    steps than fine ones, and noise decodes to something like a photo.

    Args:
        anatomy: Of the attacked model.
        space: In model-input units, one for every image of the batch.
        spectrum: The exponent s; 0 leaves pixels free.
        proved: Images and which of their patches are known to be right, shapes (batch, ...) and
            (batch, patches): these stay as they are.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        space: AffineSpace | None = None,
        spectrum: float = 0.0,
        proved: tuple[Images, Bool[Tensor, "batch patches"]] | None = None,
    ) -> None:
        self.anatomy = anatomy
        self.proved = proved
        self.space = space
        self.spectrum = spectrum
        self._pair: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def directions(self) -> int | None:
        """Free directions of each patch, None where every pixel is free."""
        return None if self.space is None else self.space.basis.shape[-1]

    @property
    def settled(self) -> bool:
        """Whether every patch is proved, so that nothing is free."""
        return self.proved is not None and bool(self.proved[1].all())

    def decode(self, free: Tensor) -> Images:
        """Return the model-input images of free variables; differentiable."""
        return self.project(self._filter(free, -1) if self.spectrum else free)

    def encode(self, images: Images) -> Tensor:
        """Return free variables that decode to the images (to their projection)."""
        return self._filter(images, 1) if self.spectrum else images.clone()

    def _filter(self, images: Tensor, sign: int) -> Tensor:
        gain = frequencies(images) ** self.spectrum
        return filtered(images, (gain / gain.mean()) ** sign)

    def project(self, images: Images) -> Images:
        """Return the nearest model-input images inside the space; differentiable."""
        inside = self._inside(images)
        if self.proved is None:
            return inside
        right, mask = self.proved
        known = torch.ones_like(self.anatomy.patchify(right)) * mask[..., None]
        return torch.where(self.anatomy.unpatchify(known) > 0, right.to(images), inside)

    def _inside(self, images: Images) -> Images:
        if self.space is None:
            return images
        if self._pair is None or self._pair[0].dtype != images.dtype:
            basis = torch.linalg.qr(self.space.basis.double())[0]
            origin = self.space.origin.double()
            self._pair = (basis.to(images), basis.mT.to(images), origin.to(images))
        basis, across, origin = self._pair
        rest = self.anatomy.patchify(images) - origin
        if basis.dim() == 2:
            return self.anatomy.unpatchify(origin + (rest @ basis) @ across)
        inside = basis @ (across @ rest[..., None])
        return self.anatomy.unpatchify(origin + inside[..., 0])


def row_space(view: View, anatomy: Anatomy) -> AffineSpace | None:
    """Return the span of all patches from dL/dW = Σ G_i x_iᵀ, or None where it is not known.

    It is known where batch · patches is below the width (else G cannot have full rank) and below
    the pixels of a patch. A gradient without a clear drop after that rank (noise, pruning, rounding
    to 16 bits) says nothing exact, so it gives None too.
    """
    try:
        anatomy.require_plain_embedding()
        gradient = view.gradient(steps=True).read(anatomy.patch_weight)
    except (Blocked, NotApplicable):
        return None
    rank = view.update.batch_size * anatomy.patches
    if rank >= min(anatomy.width, anatomy.patch_pixels):
        return None
    if not bool(gradient.isfinite().all()):
        return None
    _, values, rows = torch.linalg.svd(gradient.reshape(anatomy.width, -1), full_matrices=False)
    if not bool(values[rank] <= _GAP * values[0]):
        return None
    origin = torch.zeros(anatomy.patches, anatomy.patch_pixels, dtype=rows.dtype)
    return AffineSpace(origin.to(rows), rows[:rank].T.contiguous())
