"""The prior of images in which some patches stand elsewhere: those have no neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.vit import Anatomy

__all__ = ["ShuffledImages"]


@dataclass(frozen=True)
class ShuffledImages:
    """Natural images whose patches were moved inside a known mask, each in the slot it went to.

    Patches outside the mask are those of a natural image. A patch inside comes from anywhere: by
    itself it is a patch of a natural image, and it says nothing of its neighbours. Two sets of
    coordinates, one for each kind, in which the prior is standard normal: (batch, 2 channels,
    height, width). Interface of `NaturalImages`.

    Args:
        natural: Of the images before.
        patchwise: Of each patch by itself.
        moved: Which pixels lie inside the mask, (batch or 1, 1, height, width), 0 or 1.
    """

    natural: NaturalImages
    patchwise: NaturalImages
    moved: Tensor

    @staticmethod
    def of(natural: NaturalImages, mask: Bool[Tensor, "batch patches"]) -> ShuffledImages:
        """Return the prior for the positions that are known to be shuffled."""
        a = natural.anatomy
        pixels = mask.to(natural.mean)[..., None].expand(-1, -1, a.patch_pixels)
        return ShuffledImages(natural, natural.by_patch(), a.unpatchify(pixels)[:, :1])

    @property
    def anatomy(self) -> Anatomy:
        """How images are cut into patches."""
        return self.natural.anatomy

    @property
    def mean(self) -> Float[Tensor, "patches pixels"]:
        """The prior mean in model-input units."""
        return self.natural.mean

    def whiten(self, patches: Float[Tensor, "*batch patches pixels"]) -> Float[Tensor, "*b c h w"]:
        """Return coordinates of patches; `colour` inverts it."""
        return torch.cat([self.natural.whiten(patches), self.patchwise.whiten(patches)], -3)

    def colour(self, white: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*batch patches pixels"]:
        """Return the patches at some coordinates; differentiable."""
        return self.anatomy.patchify(self.paint(white)) + self.mean

    def paint(self, white: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b d h w"]:
        """Return what coordinates add to the mean image: the linear part of `colour`."""
        still, moved = white.chunk(2, -3)
        inside = self.moved * self.patchwise.paint(moved)
        return (1 - self.moved) * self.natural.paint(still) + inside

    def unpaint(self, slope: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b d h w"]:
        """Apply the adjoint of `paint`: derivatives by pixels become those by coordinates."""
        still = self.natural.unpaint((1 - self.moved) * slope)
        return torch.cat([still, self.patchwise.unpaint(self.moved * slope)], -3)
