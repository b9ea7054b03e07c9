"""Descents to an image whose inputs contain the rows, and the proof that an end is the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitguard.attacks.budget import Budget, charge
from vitguard.attacks.containment.spaces import RowSpaces
from vitguard.attacks.robust.natural_images import NaturalImages

__all__ = ["Fit", "proved"]

_HEAVY, _LIGHT = 0.1, 1e-3  # weights of the prior between which it gives way
_FACTOR = 0.75  # by which it gives way in a step
_CYCLES = 3  # times that it comes back, from where the last time ended
_NEAR = 2e-2  # missed, root mean square over rows, below which it goes at once
_STEPS = 100  # of a descent at most
_STUCK = 1e9  # damping
_UNSURE = 1e-2  # error of a pixel (model-input units) up to which a patch counts as proved


@dataclass(eq=False)
class Fit:
    """Levenberg-Marquardt in the coordinates in which the prior is standard normal."""

    spaces: RowSpaces
    prior: NaturalImages
    budget: Budget

    def __post_init__(self) -> None:
        self.pixels = self.spaces.view.image_shape
        count = torch.Size(self.pixels).numel()
        self.eye = torch.eye(count).to(self.prior.mean)
        self.directions = self.prior.paint(self.eye.view(count, *self.pixels))
        self.coarse = self.directions.float()

    def image(self, white: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        """Return the image of coordinates, in model-input units."""
        return self.spaces.anatomy.unpatchify(self.prior.colour(white))

    def missed(self, white: Float[Tensor, "c h w"]) -> float:
        """Return the root mean square over all rows, held-out entries too, of what they miss."""
        parts = self.spaces.missed(self.image(white)).values()
        return float(torch.cat([part.norm(dim=1) for part in parts]).square().mean().sqrt())

    def descend(self, white: Float[Tensor, "c h w"], accept: float) -> tuple[Tensor, bool]:
        """Return where a descent ends, and whether it came to its end within the budget.

        The prior gives way step by step, and comes back a few times: what fitted the rows only
        because the image was unnatural is lost that way.
        """
        weight, damping, cycle = _HEAVY, 1e-3, 1
        for _ in range(_STEPS):
            if self.spaces.jacobian_seconds > self.budget.left:
                return white, False
            white, damping, gain = self._step(white, weight, damping)
            if (missed := self.missed(white)) < 0.1 * accept:
                break
            weight *= _FACTOR
            if missed < _NEAR:
                weight *= 1e-2
                if gain < 1e-2:  # at the rounding, or in a minimum that is near it
                    break
            elif weight < _LIGHT:
                if cycle == _CYCLES:
                    break
                weight, damping, cycle = _HEAVY, 1e-3, cycle + 1
        return white, True

    def _step(self, white: Tensor, weight: float, damping: float) -> tuple[Tensor, float, float]:
        """Return the next point, its damping, and the share of the cost that it took away."""
        gap = self.spaces.gap(self.image(white))
        jacobian = self.spaces.jacobian(self.image(white).float(), self.coarse)
        charge(share=0.5, products=2.0 * jacobian.numel() * len(jacobian))
        hessian = (jacobian @ jacobian.T).to(gap)
        slope = (jacobian @ gap.float()).to(gap) + weight * white.flatten()
        cost = float(gap.square().sum() + weight * white.square().sum())
        while damping < _STUCK:
            charge(qr=len(slope) ** 3 / 3)
            step = torch.linalg.solve(hessian + (weight + damping) * self.eye, slope)
            trial = white - step.view_as(white)
            new = float(self.spaces.gap(self.image(trial)).square().sum())
            gain = 1 - (new + weight * float(trial.square().sum())) / max(cost, 1e-300)
            if gain > 0:
                return trial, max(0.2 * damping, 1e-14), gain
            damping *= 8
        return white, 1e-3, 0.0


def proved(fit: Fit, white: Float[Tensor, "c h w"], accept: float) -> Bool[Tensor, " patches"]:
    """Return the patches that the rows prove.

    None unless the equations of the fit outnumber the pixels and every row, its held-out entries
    too, lies in the inputs up to the rounding of the update. Of the patches then those whose error,
    by the covariance of the solution, is small.
    """
    spaces, anatomy = fit.spaces, fit.spaces.anatomy
    none = torch.zeros(anatomy.patches, dtype=torch.bool, device=white.device)
    image, pixels = fit.image(white), white.numel()
    missed = spaces.missed(image)
    rounded = all(
        bool((part.norm(dim=1) <= spaces.rounding[name].clamp_max(accept)).all())
        for name, part in missed.items()
    )
    if spaces.kept <= pixels or not rounded:
        return none
    jacobian = spaces.jacobian(image, fit.directions)
    charge(products=2.0 * jacobian.numel() * pixels, qr=2.0 * pixels**3)
    values, vectors = torch.linalg.eigh(jacobian @ jacobian.T)
    if not float(values[0]) > 1e-13 * float(values[-1]):
        return none
    spread = fit.prior.paint((vectors / values.sqrt()).T.reshape(pixels, *white.shape))
    noise = spaces.gap(image).square().mean()
    return (anatomy.patchify(spread).square().sum(0).mean(-1) * noise).sqrt() < _UNSURE
