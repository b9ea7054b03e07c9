"""The smoothest image inside an affine space of patches."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.core import AffineSpace
from vitguard.vit import Anatomy

__all__ = ["smoothest"]


def smoothest(
    space: AffineSpace, anatomy: Anatomy, *, iterations: int = 300, tolerance: float = 1e-7
) -> Float[Tensor, "patches pixels"]:
    """Return the patches x_i = origin_i + basis_i v_i whose image has the smallest pixel jumps.

    Minimises the sum of squared differences between neighbouring pixels, within patches and across
    their borders, by conjugate gradients on the normal equations.

    Args:
        space: Affine space of each patch, in model-input units; an orthonormal basis converges
            fastest.
        iterations: At most so many conjugate-gradient steps.
        tolerance: Relative norm of the gradient at which to stop.

    References:
        docs/methods.md 2.4 (`span-smooth`).
    """

    def image(v: Tensor) -> Tensor:
        if space.basis.dim() == 2:
            return anatomy.unpatchify(v @ space.basis.T)
        return anatomy.unpatchify(torch.einsum("npk,nk->np", space.basis, v))

    def adjoint(pixels: Tensor) -> Tensor:
        patches = anatomy.patchify(pixels)
        if space.basis.dim() == 2:
            return patches @ space.basis
        return torch.einsum("npk,np->nk", space.basis, patches)

    residual = -adjoint(_laplacian(anatomy.unpatchify(space.origin)))
    v = torch.zeros_like(residual)
    direction = residual.clone()
    energy = residual.square().sum()
    stop = tolerance**2 * energy
    for _ in range(iterations):
        if energy <= stop:
            break
        curved = adjoint(_laplacian(image(direction)))
        step = energy / (direction * curved).sum().clamp_min(1e-300)
        v = v + step * direction
        residual = residual - step * curved
        previous, energy = energy, residual.square().sum()
        direction = residual + (energy / previous) * direction
    return anatomy.patchify(anatomy.unpatchify(space.origin) + image(v))


def _laplacian(pixels: Tensor) -> Tensor:
    """Gradient of half the sum of squared jumps between neighbouring pixels."""
    result = torch.zeros_like(pixels)
    for axis in (-1, -2):
        length = pixels.shape[axis]
        jump = pixels.narrow(axis, 1, length - 1) - pixels.narrow(axis, 0, length - 1)
        result.narrow(axis, 1, length - 1).add_(jump)
        result.narrow(axis, 0, length - 1).sub_(jump)
    return result
