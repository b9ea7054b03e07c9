"""The most photo-like image inside an affine space of patches: sparse curvature."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.attacks.equations.linear import conjugate_gradients
from vitguard.core import AffineSpace, Normalization
from vitguard.vit import Anatomy

__all__ = ["smoothest"]

# second differences along and across; along both they see corners only
_AXES = ((-1, -1), (-2, -2), (-2, -1))
# brightness and two opponent colours (rows orthonormal): photos vary least in the last ones
_COLOURS = ((3**-0.5,) * 3, (2**-0.5, 0.0, -(2**-0.5)), (6**-0.5, -2 * 6**-0.5, 6**-0.5))
# what counts as a small curvature, in pixels of range 1: from nearly a quadratic to nearly a sum
# of absolute values, down to a step of 8-bit pixels
_COARSE, _FINE = 0.1, 1 / 256
_WALL = 100.0  # weight of a squared pixel outside [0, 1]
_ROUNDS = 15

Image = Float[Tensor, "channels height width"]


def smoothest(
    space: AffineSpace,
    anatomy: Anatomy,
    *,
    normalization: Normalization,
    iterations: int = 30,
    tolerance: float = 1e-5,
) -> Float[Tensor, "patches pixels"]:
    """Return the patches x_i = origin_i + basis_i v_i whose image has the sparsest curvature.

    Minimises the sum of absolute second differences between neighbouring pixels, within patches
    and across their borders, in brightness and opponent colours, each relative to its own mean;
    pixels outside [0, 1] cost extra. Photos are straight ramps with a few edges, and the wrong
    mixtures that the equations allow put other patches' edges everywhere. Inside a patch those
    look like a photo too and stand out only where patches meet, so all borders together weigh as
    much as all insides. An absolute value forgives the edges of the photo itself, which a square
    would blur away. Solved by reweighted least squares: conjugate gradients, then weights from
    the result. Nothing is fitted to photos.

    Args:
        space: Affine space of each patch, in model-input units; an orthonormal basis converges
            fastest.
        normalization: From pixels in [0, 1] to model input.
        iterations: At most so many conjugate-gradient steps in each of 15 rounds of weights.
        tolerance: Relative norm of the residual at which a round stops.

    References:
        docs/methods.md 2.4 (`span-smooth`). Reweighting: Daubechies et al., arXiv 0807.0575.
    """
    # float32 halves the time; the prior is rough, and the result lies in the space all the same
    origin, basis = space.origin.float(), space.basis.float()
    scale = torch.tensor(normalization.std).to(origin)
    colours = _colours(anatomy.channels).to(origin) * scale
    wide = scale[:, None, None]

    def image(v: Tensor) -> Image:
        return anatomy.unpatchify(_along(basis, v))

    def curvature(pixels: Image) -> list[Tensor]:
        return list(_curvature(torch.einsum("dc,chw->dhw", colours, pixels)))

    def pull(curved: list[Tensor], outside: Image) -> Tensor:
        """Return the adjoint of v -> (curvature, pixels) of image(v)."""
        pixels = torch.einsum("dc,dhw->chw", colours, _spread(curved)) + wide * outside
        patches = anatomy.patchify(pixels)
        return patches @ basis if basis.dim() == 2 else torch.einsum("npk,np->nk", basis, patches)

    start = anatomy.unpatchify(origin)
    each = basis.numel() * (len(origin) if basis.dim() == 2 else 1)
    borders = _borders(anatomy, start)
    v = origin.new_zeros(len(origin), basis.shape[-1])
    for turn in range(_ROUNDS):
        small = _COARSE * (_FINE / _COARSE) ** min(1.0, turn / (0.8 * _ROUNDS))
        now = start + image(v)
        curved, pixels = curvature(now), normalization.invert(now)
        beyond = pixels - pixels.clamp(0, 1)
        weights = _times(borders, _weights(curved, small))
        walls = _WALL * (beyond != 0).to(beyond)

        def operator(
            step: Tensor, weights: list[Tensor] = weights, walls: Tensor = walls
        ) -> Tensor:
            charge(products=4.0 * each, share=0.5)
            charge(elements=1.5 * start.numel(), calls=60, share=0.5)
            moved = image(step)
            return pull(_times(weights, curvature(moved)), walls * wide * moved)

        right = -pull(_times(weights, curved), _WALL * beyond)
        v = v + conjugate_gradients(operator, right, iterations=iterations, tolerance=tolerance)
    return space.origin + _along(space.basis, v.to(space.origin))


def _along(basis: Tensor, v: Float[Tensor, "patches free"]) -> Float[Tensor, "patches pixels"]:
    return v @ basis.T if basis.dim() == 2 else torch.einsum("npk,nk->np", basis, v)


def _colours(channels: int) -> Float[Tensor, "mixed given"]:
    return torch.tensor(_COLOURS) if channels == 3 else torch.eye(channels)


def _weights(curved: list[Tensor], small: float) -> list[Tensor]:
    """Return what makes squares of the curvature stand for its size relative to the mean size."""
    sizes = [c.abs().mean((-2, -1), keepdim=True).clamp_min(_FINE / 8) for c in curved]
    usual = torch.cat(sizes).log().mean().exp()
    return [
        usual / size * (c.square() + small**2).rsqrt()
        for c, size in zip(curved, sizes, strict=True)
    ]


def _borders(anatomy: Anatomy, image: Image) -> list[Tensor]:
    """Return a weight for each second difference: above 1 where it reaches over a border."""
    weights = []
    for axes in _AXES:
        over = torch.zeros((), dtype=torch.bool, device=image.device)
        for axis, patch in zip((-1, -2), reversed(anatomy.patch_size), strict=True):
            size, reach = image.shape[axis], axes.count(axis)
            patches = torch.arange(size, device=image.device) // patch
            parts = patches[reach:] != patches[: size - reach]
            over = over | (parts if axis == -1 else parts[:, None])
        balance = max(1.0, float((~over).sum() / over.sum().clamp_min(1)))
        weights.append(1 + (balance - 1) * over.to(image))
    return weights


def _curvature(image: Tensor) -> Iterator[Tensor]:
    for first, second in _AXES:
        yield image.diff(dim=first).diff(dim=second)


def _spread(curved: list[Tensor]) -> Tensor:
    """Return the adjoint of `_curvature`: zeros around, and the same differences again."""
    total = None
    for (first, second), part in zip(_AXES, curved, strict=True):
        across, down = ((first, second).count(axis) for axis in (-1, -2))
        spread = F.pad(part, (across, across, down, down)).diff(dim=first).diff(dim=second)
        total = spread if total is None else total + spread
    assert total is not None
    return total


def _times(weights: list[Tensor], curved: list[Tensor]) -> list[Tensor]:
    return [w * c for w, c in zip(weights, curved, strict=True)]
