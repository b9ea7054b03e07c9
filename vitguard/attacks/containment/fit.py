"""Descents to an image whose inputs contain the rows, and the proof that an end is the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitguard.attacks.budget import Budget, charge
from vitguard.attacks.containment.spaces import RowSpaces
from vitguard.attacks.robust.natural_images import NaturalImages

__all__ = ["Fit", "proved"]

_HEAVY, _LIGHT = 0.1, 1e-3  # weights of the prior between which it gives way
_FACTOR = 0.75  # by which it gives way in a step
_NONE = 1e-10  # weight of a prior that says nothing any more
_NEAR = 2e-2  # missed, root mean square over rows, below which it goes at once
_GAIN = 0.03  # share of the cost that a step takes away, below which it goes no further
_STEPS = 100  # of a descent at most
_STUCK = 1e9  # damping
_AT_ONCE = 1024  # orders of the patches
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
        """Return the root mean square over all rows, held-out ones too, of what they miss."""
        parts = self.spaces.missed(self.image(white)).values()
        return float(torch.cat([part.norm(dim=1) for part in parts]).square().mean().sqrt())

    def contained(self, white: Float[Tensor, "c h w"]) -> bool:
        """Say whether all rows lie in the inputs up to the rounding of the update."""
        return self.spaces.contained(self.image(white))

    def descend(
        self, white: Float[Tensor, "c h w"], *, weight: float = _HEAVY, steps: int = _STEPS
    ) -> tuple[Tensor, bool]:
        """Return where a descent ends, and whether it came there within the budget.

        The prior gives way step by step, so that an unnatural image which fits the rows as well is
        not the first to be met, and at once where nearly nothing is missed.

        Args:
            white: Where it begins.
            weight: Of the prior at the beginning.
            steps: At most.
        """
        damping, sharp = 1e-3, False
        for _ in range(steps):
            if self.spaces.jacobian_seconds > self.budget.left:
                return white, False
            white, damping, gain = self._step(white, weight, damping, sharp=sharp)
            sharp = self.missed(white) < _NEAR
            if gain < _GAIN and weight < (_NONE if sharp else _LIGHT):
                break
            weight = max(weight * (1e-2 if sharp else _FACTOR), 0.01 * _NONE)
        return white, True

    def reordered(self, white: Float[Tensor, "c h w"], count: int) -> list[Float[Tensor, "c h w"]]:
        """Return the image with two or three patches moved, the most natural ways first.

        The rows of a layer do not tell the order of its inputs, and positions weigh little beside
        the pixels: a descent may end with the right patches at each other's places.
        """
        patches = self.spaces.anatomy.patchify(self.image(white)[None])[0]
        orders = _moves(len(patches))
        work = len(orders) * white.numel()
        charge(products=2.0 * work * sum(white.shape[1:]), elements=0.1 * work)
        energy = [
            self.prior.whiten(patches[some]).flatten(1).square().sum(1)
            for some in orders.split(_AT_ONCE)
        ]
        best = torch.cat(energy).topk(min(count, len(orders)), largest=False).indices
        return list(self.prior.whiten(patches[orders[best.cpu()]]))

    def _step(
        self, white: Tensor, weight: float, damping: float, *, sharp: bool
    ) -> tuple[Tensor, float, float]:
        """Return the next point, its damping, and the share of the cost that it took away."""
        gap = self.spaces.gap(self.image(white), sharp=sharp)
        jacobian = self.spaces.jacobian(self.image(white).float(), self.coarse, sharp=sharp)
        charge(share=0.5, products=2.0 * jacobian.numel() * len(jacobian))
        hessian = (jacobian @ jacobian.T).to(gap)
        slope = (jacobian @ gap.float()).to(gap) + weight * white.flatten()
        cost = float(gap.square().sum() + weight * white.square().sum())
        while damping < _STUCK:
            charge(qr=len(slope) ** 3 / 3)
            step = torch.linalg.solve(hessian + (weight + damping) * self.eye, slope)
            trial = white - step.view_as(white)
            new = float(self.spaces.gap(self.image(trial), sharp=sharp).square().sum())
            gain = 1 - (new + weight * float(trial.square().sum())) / max(cost, 1e-300)
            if gain > 0:
                return trial, max(0.2 * damping, 1e-14), gain
            damping *= 8
        return white, 1e-3, 0.0


def _moves(count: int) -> Int[Tensor, "orders patches"]:
    """Return every order in which two patches, or three in a ring, have changed places."""
    made = []
    for size in (2, 3):
        places = torch.combinations(torch.arange(count), size)
        for turn in range(1, size):
            order = torch.arange(count).repeat(len(places), 1)
            made.append(order.scatter(1, places, places.roll(turn, 1)))
    return torch.cat(made)


def proved(fit: Fit, white: Float[Tensor, "c h w"]) -> Bool[Tensor, " patches"]:
    """Return the patches that the rows prove.

    None unless the equations that were fitted outnumber the pixels, and every row, those held out
    too, lies in the inputs up to the rounding of the update, but not with the patches in another
    order (without positions). Of the patches then those whose error, by the covariance of the
    solution, is small.
    """
    spaces, anatomy, image, pixels = fit.spaces, fit.spaces.anatomy, fit.image(white), white.numel()
    none = torch.zeros(anatomy.patches, dtype=torch.bool, device=white.device)
    held_out = sum(map(len, spaces.rows.values())) - sum(map(len, spaces.picks.values()))
    if spaces.kept <= pixels or not held_out or not spaces.contained(image):
        return none
    if spaces.contained(anatomy.unpatchify(anatomy.patchify(image).roll(1, 0))):
        return none
    jacobian = spaces.jacobian(image, fit.directions, sharp=True)
    charge(products=2.0 * jacobian.numel() * pixels, qr=2.0 * pixels**3)
    values, vectors = torch.linalg.eigh(jacobian @ jacobian.T)
    if not float(values[0]) > 1e-13 * float(values[-1]):
        return none
    spread = fit.prior.paint((vectors / values.sqrt()).T.reshape(pixels, *white.shape))
    noise = spaces.gap(image, sharp=True).square().mean()
    return (anatomy.patchify(spread).square().sum(0).mean(-1) * noise).sqrt() < _UNSURE
