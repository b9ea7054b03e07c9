"""Maximum a posteriori form of `position`, for gradients that are not exact.

Positions and patches are read with errors of like size, G' = G + F and Y = G^T X + E, so what is
left of Y - G'^T X has the covariance I + X^T X over pixels (and not I): bright common patterns are
less certain than fine ones. With the Gaussian prior of natural images the estimate is the solution
of a linear system; its noise level is read off the equations that no image can fill
(docs/methods.md 2.5c, 4.5).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import ENDLESS, Budget, charge
from vitguard.attacks.equations.linear import conjugate_gradients
from vitguard.attacks.equations.rows import patch_gradient, position_gradient
from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.core import View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = ["position_estimates"]

_HOLDS = (10.0, 1.0, 100.0, 0.1, 1000.0)
"""Times the noise estimate: the prior is no more than roughly right, and so is the noise."""


def position_estimates(
    view: View, anatomy: Anatomy, budget: Budget = ENDLESS
) -> Iterator[tuple[dict[str, object], Float[Tensor, "patches pixels"]]]:
    """Yield (settings, patches X) that minimise |Y - G^T X|^2 / noise + prior(X), likeliest first.

    Args:
        budget: Once it is spent they are rough.

    Raises:
        NotApplicable: The model has no absolute position embedding.
        Blocked: The gradient of positions or patches cannot be read.
    """
    if anatomy.positions is None:
        raise NotApplicable("the model has no absolute position embedding")
    seen = position_gradient(view, anatomy)
    target, prior = patch_gradient(view, anatomy), NaturalImages.of(view, anatomy)
    size = target.square().mean(1)
    # added noise is the same in every row; rounding is relative to the row
    forms = {"even": size.mean().expand_as(size), "rows": size.clamp_min(1e-12 * size.mean())}
    for hold in _HOLDS:
        for name, shape in forms.items():
            noise = hold * _noise_level(seen, target, shape) * shape
            patches = _solve(seen, target, noise, prior, budget=budget)
            spread = patches.T @ patches
            spread = torch.eye(len(spread)).to(spread) + spread
            spread = spread / spread.diagonal().mean()
            both = _solve(seen, target, noise, prior, spread, budget)
            yield {"rows": name, "hold": hold, "errors": "in patches and positions"}, both
            yield {"rows": name, "hold": hold, "errors": "in patches"}, patches


def _noise_level(seen: Tensor, target: Tensor, shape: Tensor) -> float:
    """Return the variance of Y - G^T X relative to `shape`, from the surplus of equations."""
    weight = shape.rsqrt()[:, None]
    system, right = weight * seen.T, weight * target
    charge(svd=system.numel() * min(system.shape), products=4 * target.numel() * len(seen))
    left, values, _ = torch.linalg.svd(system, full_matrices=False)
    left = left[:, values > 1e-12 * values[0]]
    surplus = len(target) - left.shape[1]
    if surplus <= 0:
        return 1e-4
    missed = right - left @ (left.T @ right)
    return max(float(missed.square().sum()) / (surplus * right.shape[1]), 1e-26)


def _solve(
    seen: Float[Tensor, "patches width"],
    target: Float[Tensor, "width pixels"],
    noise: Float[Tensor, " width"],
    prior: NaturalImages,
    spread: Float[Tensor, "pixels pixels"] | None = None,
    budget: Budget = ENDLESS,
) -> Float[Tensor, "patches pixels"]:
    """Solve (G N^-1 G^T) dX S^-1 + prior dX = G N^-1 (Y - G^T mean) S^-1, X = mean + dX."""
    weighted = seen / noise
    normal = weighted @ seen.T
    right = weighted @ (target - seen.T @ prior.mean)
    spread = torch.eye(right.shape[1]).to(right) if spread is None else spread
    width, side = torch.linalg.eigh(spread)
    inverse = (side / width) @ side.T
    strength, basis = torch.linalg.eigh(normal)
    size = strength.clamp_min(0)[:, None] / width + prior.stiffness

    count, pixels = right.shape
    across = 2.0 * count * pixels * (count + pixels)  # a product from both sides
    charge(qr=2 * (count**3 + pixels**3), products=2 * len(noise) * count * (count + 2 * pixels))

    def operator(x: Tensor) -> Tensor:
        charge(products=across, calls=4)
        return normal @ x @ inverse + prior.precision(x)

    def precondition(r: Tensor) -> Tensor:
        charge(products=2 * across, calls=6)
        return basis @ ((basis.T @ r @ side) / size) @ side.T

    return prior.mean + conjugate_gradients(
        operator,
        right @ inverse,
        precondition,
        budget=budget,
    )
