"""Scores of a guess beside its truth, image by image: PSNR, SSIM, LPIPS and others."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from vitguard.errors import expected
from vitguard.metrics.checked import (
    Images,
    Perceptual,
    PerImage,
    checked,
    decibels,
    matched_mse,
    patches_of,
)

__all__ = ["fft2d", "lpips", "mse", "patch_psnr", "psnr", "ssim"]

_SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
_SSIM_C1 = 0.01**2
_SSIM_C2 = 0.03**2


def mse(guess: Images, truth: Images) -> PerImage:
    """Return the mean squared error of each image."""
    guess, truth = _pair(guess, truth)
    return (guess - truth).square().flatten(1).mean(1)


def psnr(guess: Images, truth: Images) -> PerImage:
    """Return -10 log10(MSE) of each image, in dB, at most `PSNR_CAP`."""
    return decibels(mse(guess, truth))


def patch_psnr(guess: Images, truth: Images, patch_size: tuple[int, int]) -> PerImage:
    """Return each image's PSNR in dB after the best one-to-one move of whole patches.

    Moving pieces around must not count as protection, so this is never below `psnr`.

    Args:
        guess: Pixels in [0, 1].
        truth: Pixels in [0, 1], same shape.
        patch_size: (height, width) of a patch in pixels; must divide the image.
    """
    guess, truth = _pair(guess, truth)
    pieces = zip(patches_of(guess, patch_size), patches_of(truth, patch_size), strict=True)
    matched = decibels(torch.stack([matched_mse(g, t) for g, t in pieces]))
    return torch.maximum(matched, psnr(guess, truth))  # equal but for rounding where none moved


def ssim(guess: Images, truth: Images) -> PerImage:
    """Return each image's mean structural similarity, in [-1, 1].

    Gaussian window of 11 x 11 with standard deviation 1.5, data range 1, population covariance,
    only windows that lie inside the image, mean over channels. Under 11 pixels the window shrinks
    to the largest odd size that fits.
    """
    guess, truth = _pair(guess, truth)
    size = min(_SSIM_WINDOW, *truth.shape[-2:])
    offsets = torch.arange(size - (size + 1) % 2, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((offsets - offsets.mean()) / _SSIM_SIGMA).square())
    weights = weights / weights.sum()

    def smooth(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)[:, None]
        return functional.conv2d(
            functional.conv2d(flat, weights[None, None, :, None]), weights[None, None, None, :]
        ).view(*values.shape[:2], -1)

    mean_g, mean_t = smooth(guess), smooth(truth)
    var_g = smooth(guess.square()) - mean_g.square()
    var_t = smooth(truth.square()) - mean_t.square()
    covariance = smooth(guess * truth) - mean_g * mean_t
    luminance = (2 * mean_g * mean_t + _SSIM_C1) / (mean_g.square() + mean_t.square() + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (var_g + var_t + _SSIM_C2)
    return (luminance * structure).flatten(1).mean(1)


def fft2d(guess: Images, truth: Images) -> PerImage:
    """Return 1 - cosine of the magnitude spectra of each image, in [0, 1]; 0 is the same spectrum.

    Spectra are 2-D per channel, without the zero frequency. A constant image has no spectrum: it is
    at distance 1 from everything but another constant image.
    """
    guess, truth = _pair(guess, truth)
    a, b = _spectrum(guess), _spectrum(truth)
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(1) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    both_constant = (a == 0).all(1) & (b == 0).all(1)
    return torch.where(both_constant, 0.0, (1 - cosine).clamp(0, 1))


def lpips(guess: Images, truth: Images, model: Perceptual) -> PerImage:
    """Return the learned perceptual distance of each image under the caller's `model`.

    Args:
        guess: Pixels in [0, 1].
        truth: Pixels in [0, 1], same shape.
        model: Takes two float32 batches in [-1, 1] and returns one distance per image, as
            `lpips.LPIPS` does. Nothing is ever downloaded here.
    """
    guess, truth = _pair(guess, truth)
    with torch.no_grad():
        distance = model(guess.float() * 2 - 1, truth.float() * 2 - 1)
    if distance.numel() != len(truth) or not distance.isfinite().all():
        raise expected(f"{len(truth)} finite distances from the LPIPS model", tuple(distance.shape))
    return distance.detach().flatten().to("cpu", torch.float64)


def _pair(guess: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    guess, truth = checked(guess, "guess"), checked(truth, "truth", strict=True)
    if guess.shape != truth.shape:
        raise expected(f"a guess of shape {tuple(truth.shape)}", tuple(guess.shape))
    return guess, truth


def _spectrum(images: Tensor) -> Float[Tensor, "batch frequencies"]:
    spectrum = torch.fft.fft2(images).abs().flatten(2)[:, :, 1:]
    # Rounding leaves about 1e-13 per frequency in a constant channel: that is no spectrum.
    noise = 1e-12 * images.shape[-1] * images.shape[-2]
    return torch.where(spectrum > noise, spectrum, 0.0).flatten(1)
