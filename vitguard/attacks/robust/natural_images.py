"""The Gaussian prior of natural images, and the solver for estimates under it.

Photos have power 1 / frequency^2 (Field 1987) and colours that vary less than brightness (Ruderman
et al. 1998). As a Gaussian with that covariance the prior is quadratic, so a maximum a posteriori
estimate from linear equations is one linear solve (docs/methods.md 4.5). The constants are those of
ten openly licensed photos, none of which is a sample photo or test image of this project:
`benchmarks/prior.py` names them and computes the numbers anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.core import Normalization, View
from vitguard.vit import Anatomy

__all__ = ["NaturalImages"]

_MEAN = 0.43  # of pixels in [0, 1]
_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
_DEVIATIONS = (0.42, 0.16, 0.05)  # along brightness, red-blue, green-magenta
_COLOURS = 0.9  # correlation of channels that are not red, green, blue
_KNEE = 0.65  # cycles of the longer side below which power stays the same
Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NaturalImages:
    """Images as a Gaussian: mid-grey, power 1 / (knee^2 + cycles^2) in the cosine basis.

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
        device = next(view.model.parameters()).device
        return NaturalImages.shaped(anatomy, view.image_shape, view.normalization, device)

    @staticmethod
    def shaped(
        anatomy: Anatomy,
        shape: tuple[int, int, int],
        norm: Normalization,
        device: torch.device | str = "cpu",
    ) -> NaturalImages:
        """Return the prior for images of `shape`, (channels, height, width), in float64."""
        channels, height, width = shape
        device = torch.device(device)
        rows = torch.arange(height, dtype=torch.float64, device=device)[:, None] / height
        columns = torch.arange(width, dtype=torch.float64, device=device)[None] / width
        power = 1 / (_KNEE**2 + (rows.square() + columns.square()) * max(height, width) ** 2)
        power = power * (height * width / power.sum())
        scale = torch.tensor(norm.std, dtype=torch.float64, device=device)
        grey = torch.full(shape, _MEAN, dtype=torch.float64, device=device)
        return NaturalImages(
            anatomy,
            anatomy.patchify(norm.apply(grey)),
            _cosines(height, device),
            _cosines(width, device),
            power.sqrt(),
            _mixing(channels, device) / scale[:, None],
        )

    def by_patch(self) -> NaturalImages:
        """Return the prior of each patch by itself: cosines of single patches, as they vary here.

        Coefficients of one patch are taken as independent, which those of 1 / f^2 nearly are.
        """
        down, across = (
            torch.block_diag(*[_cosines(size, self.mean.device)] * (len(basis) // size))
            for size, basis in zip(self.anatomy.patch_size, (self.down, self.across), strict=True)
        )
        rows, columns = (down @ self.down.T).square(), (across @ self.across.T).square()
        spread = (rows @ self.spread.square() @ columns.T).sqrt()
        return replace(self, down=down, across=across, spread=spread)

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

    def whiten(self, patches: Float[Tensor, "*batch patches pixels"]) -> Float[Tensor, "*b c h w"]:
        """Return the coordinates of patches in which the prior is standard normal."""
        image = self.anatomy.unpatchify(patches - self.mean)
        image = torch.linalg.solve(self.mixing, image.flatten(-2)).view_as(image)
        return (self.down @ image @ self.across.T) / self.spread

    def colour(self, white: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*batch patches pixels"]:
        """Invert `whiten`; differentiable."""
        return self.anatomy.patchify(self.paint(white)) + self.mean

    def paint(self, white: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """Return what coordinates add to the mean image: the linear part of `colour`."""
        image = self.down.T @ (white * self.spread) @ self.across
        return (self.mixing @ image.flatten(-2)).view_as(image)

    def unpaint(self, slope: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """Apply the adjoint of `paint`: derivatives by pixels become those by coordinates."""
        image = (self.mixing.T @ slope.flatten(-2)).view_as(slope)
        return (self.down @ image @ self.across.T) * self.spread

    @property
    def stiffness(self) -> float:
        """A typical eigenvalue of the precision, for preconditioning."""
        size = self.spread.square().mean() * self.mixing.square().sum(1).mean()
        return float(1 / size)


def _mixing(channels: int, device: torch.device) -> Tensor:
    """Return a square root of the covariance of the channels of pixels in [0, 1]."""
    like = {"dtype": torch.float64, "device": device}
    if channels == 3:
        axes = torch.nn.functional.normalize(torch.tensor(_AXES, **like))
        return axes.T * torch.tensor(_DEVIATIONS, **like)
    colours = torch.full((channels, channels), _COLOURS, **like).fill_diagonal_(1.0)
    return torch.linalg.cholesky(colours) * (_DEVIATIONS[0] / 3**0.5)


def _cosines(size: int, device: torch.device) -> Tensor:
    """Return the orthonormal type-II cosine basis, one wave a row."""
    at = torch.arange(size, dtype=torch.float64, device=device)
    waves = torch.cos(math.pi * (at[None] + 0.5) * at[:, None] / size) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves
