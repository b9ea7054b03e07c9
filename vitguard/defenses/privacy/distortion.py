"""How close in mean squared error any attack can come to an image under Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vitguard.errors import expected

__all__ = ["mse_bound", "unbiased_mse_bound"]


def mse_bound(
    variances: Sequence[float] | np.ndarray, noise: float, steps: int, rate: float = 1.0
) -> float:
    """Return the least mean squared error per pixel of any estimate of a Gaussian image.

    Of releases that are clipped sums with Gaussian noise, a record is in at most
    steps * rate / (2 noise^2) nats of information, whatever the weights, since each release differs
    from one without the record by a divergence of rate / (2 noise^2) at most. An image that is
    Gaussian cannot be described more closely with so much than rate-distortion theory says: with
    an error of at most `level` in each direction, the same `level` for all.

    It holds on average over images of that prior, for any estimate, biased or not. Natural
    images are not Gaussian: with what else an adversary knows of them it may come closer. In the
    mean over images, PSNR can be above that of this error.

    Args:
        variances: Of the pixels along the principal directions of the prior, each above 0; with
            pixels in [0, 1] the error is in squares of that unit.
        noise: Noise multiplier, above 0.
        steps: Releases, at least 0.
        rate: Poisson sampling rate in (0, 1].

    Raises:
        InputError: A value out of range.

    Reference: Cover and Thomas, Elements of Information Theory, theorem 10.3.3 (reverse
    water-filling).
    """
    spread = np.sort(np.asarray(variances, dtype=np.float64).ravel())[::-1]
    if not len(spread) or not (np.isfinite(spread).all() and spread[-1] > 0):
        raise expected("variances above 0", list(variances)[:5])
    if not (noise > 0 and steps >= 0 and 0 < rate <= 1):
        raise expected(
            "noise above 0, steps of at least 0 and a rate in (0, 1]", f"{noise}, {steps}, {rate}"
        )
    nats = steps * rate / (2 * noise**2)
    logs = np.log(spread)
    count = np.arange(1, len(spread) + 1)
    levels = (np.cumsum(logs) - 2 * nats) / count  # of the log, were the first `count` above it
    following = np.append(logs[1:], -math.inf)
    told = int(np.argmax(levels >= following))
    level = math.exp(levels[told])
    return float(np.minimum(spread, level).mean())


def unbiased_mse_bound(pixels: int, noise: float, steps: int = 1) -> float:
    """Return the least mean squared error per pixel of an unbiased estimate from a linear readout.

    A readout is a gradient that is an affine map of the image, as a malicious server can make one,
    and is never clipped, for no image with pixels in [0, 1]. Averaged over the corners of that box
    its squared norm is at most clip^2, so the map's squared Frobenius norm is at most 4 clip^2; the
    Cramer-Rao inequality then gives noise^2 * pixels / (4 * steps), at best where all directions
    are read alike. It says nothing of estimates that use what images look like: these are biased.
    `mse_bound` holds for them.

    Args:
        pixels: Numbers in an image, channels counted, at least 1.
        noise: Noise multiplier, at least 0.
        steps: Releases of the same map, at least 1.

    Raises:
        InputError: A value out of range.

    Reference: derived here; the question is that of Riess et al., arXiv:2402.12861.
    """
    if pixels < 1 or not noise >= 0 or steps < 1:
        raise expected(
            "pixels and steps of at least 1 and noise of at least 0", f"{pixels}, {noise}, {steps}"
        )
    return noise**2 * pixels / (4 * steps)
