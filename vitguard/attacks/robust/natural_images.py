"""The Gaussian prior of natural images, and the solver for estimates under it.

Photos have power 1 / frequency^2 (Field 1987) and colour channels that go together (Ruderman et al.
1998). As a Gaussian with that covariance the prior is quadratic, so a maximum a posteriori estimate
from linear equations is one linear solve (docs/methods.md 4.5). The constants are round numbers for
photographs in general; none is fitted to an image of this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.core import Normalization, View
from vitguard.vit import Anatomy

__all__ = ["NaturalImages"]

_MEAN, _SPREAD, _COLOURS = 0.45, 0.25, 0.9  # of pixels in [0, 1], and correlation of channels
Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NaturalImages:
    """Images as a Gaussian: mid-grey, power 1 / (1 + cycles^2) in the cosine basis.

    Args:
        anatomy: Of the attacked model: how images are cut into patches.
        mean: The prior mean in model-input units, shape (patches, pixels).
        down, across: Orthonormal cosine bases, shapes (height, height) and (width, width).
        spread: Standard deviation of each cosine coefficient, shape (height, width).
        mixing: Square root of the covariance of channels in model-input units.
    """

    anatomy: Anatomy
    mean: Float[Tensor, "patches pixels"]
    down: Tensor
    across: Tensor
    spread: Float[Tensor, "height width"]
    mixing: Float[Tensor, "channels channels"]

    @staticmethod
    def of(view: View, anatomy: Anatomy) -> NaturalImages:
        """Return the prior for the images of this view, in float64 on the model's device."""
        channels, height, width = view.image_shape
        device = next(view.model.parameters()).device
        norm: Normalization = view.normalization
        rows = torch.arange(height, dtype=torch.float64, device=device)[:, None] / height
        columns = torch.arange(width, dtype=torch.float64, device=device)[None] / width
        power = 1 / (1 + (rows.square() + columns.square()) * max(height, width) ** 2)
        power = power * (height * width * _SPREAD**2 / power.sum())
        colours = torch.full((channels, channels), _COLOURS, dtype=torch.float64, device=device)
        colours = colours.fill_diagonal_(1.0)
        scale = torch.tensor(norm.std, dtype=torch.float64, device=device)
        grey = torch.full(view.image_shape, _MEAN, dtype=torch.float64, device=device)
        return NaturalImages(
            anatomy,
            anatomy.patchify(norm.apply(grey)),
            _cosines(height, device),
            _cosines(width, device),
            power.sqrt(),
            torch.linalg.cholesky(colours) / scale[:, None],
        )

    def precision(self, patches: Float[Tensor, "patches pixels"]) -> Tensor:
        """Return the inverse covariance applied to patches (differences from the mean)."""
        image = self.anatomy.unpatchify(patches)
        edges = sum(image.shape[-2:])
        charge(products=4.0 * image.numel() * edges, elements=0.5 * image.numel(), calls=14)
        waves = self.down @ torch.linalg.solve(self.mixing, image.flatten(1)).view_as(image)
        waves = (waves @ self.across.T) / self.spread.square()
        image = self.down.T @ waves @ self.across
        image = torch.linalg.solve(self.mixing.T, image.flatten(1)).view_as(image)
        return self.anatomy.patchify(image)

    def whiten(self, patches: Float[Tensor, "patches pixels"]) -> Float[Tensor, "c h w"]:
        """Return the coordinates of patches in which the prior is standard normal."""
        image = self.anatomy.unpatchify(patches - self.mean)
        image = torch.linalg.solve(self.mixing, image.flatten(1)).view_as(image)
        return (self.down @ image @ self.across.T) / self.spread

    def colour(self, white: Float[Tensor, "c h w"]) -> Float[Tensor, "patches pixels"]:
        """Invert `whiten`; differentiable."""
        image = self.down.T @ (white * self.spread) @ self.across
        image = (self.mixing @ image.flatten(1)).view_as(image)
        return self.anatomy.patchify(image) + self.mean

    @property
    def stiffness(self) -> float:
        """A typical eigenvalue of the precision, for preconditioning."""
        size = self.spread.square().mean() * self.mixing.square().sum(1).mean()
        return float(1 / size)


def _cosines(size: int, device: torch.device) -> Tensor:
    """Return the orthonormal type-II cosine basis, one wave a row."""
    at = torch.arange(size, dtype=torch.float64, device=device)
    waves = torch.cos(math.pi * (at[None] + 0.5) * at[:, None] / size) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves
