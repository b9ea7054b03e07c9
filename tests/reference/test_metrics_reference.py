"""Metrics against scikit-image, and against slow implementations that can be checked by eye."""

from itertools import permutations
from math import comb, log10

import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from vitguard import data, metrics


@pytest.fixture(scope="module")
def photos():
    return data.sample_images((48, 64)).pixels.double()


def noisy(images, sigma, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return (images + sigma * noise).clamp(0, 1)


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.2, 1.0])
def test_psnr_mse_and_ssim_equal_scikit_image(photos, sigma):
    guess = noisy(photos, sigma)
    for g, t, mse, psnr, ssim in zip(
        guess,
        photos,
        metrics.mse(guess, photos),
        metrics.psnr(guess, photos),
        metrics.ssim(guess, photos),
        strict=True,
    ):
        g, t = g.numpy(), t.numpy()
        assert float(mse) == pytest.approx(mean_squared_error(t, g), abs=1e-14)
        if sigma:
            assert float(psnr) == pytest.approx(peak_signal_noise_ratio(t, g, data_range=1))
        reference = structural_similarity(
            t,
            g,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=0,
        )
        assert float(ssim) == pytest.approx(reference, abs=1e-10)


def slow_ssim(x, y, size):
    radius = (size - 1) / 2
    axis = np.exp(-0.5 * ((np.arange(size) - radius) / 1.5) ** 2)
    window = np.outer(axis, axis) / axis.sum() ** 2
    values = []
    for channel in range(x.shape[0]):
        for row in range(x.shape[1] - size + 1):
            for column in range(x.shape[2] - size + 1):
                a = x[channel, row : row + size, column : column + size]
                b = y[channel, row : row + size, column : column + size]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (
                    (window * (a - mean_a) ** 2).sum(),
                    (window * (b - mean_b) ** 2).sum(),
                )
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                values.append(
                    (2 * mean_a * mean_b + 1e-4)
                    * (2 * covariance + 9e-4)
                    / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
                )
    return np.mean(values)


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(12, 11, 11), (10, 30, 9), (8, 8, 7), (5, 7, 5), (2, 9, 1), (1, 1, 1)],
)
def test_ssim_of_small_images_uses_the_largest_odd_window_that_fits(height, width, window):
    generator = torch.Generator().manual_seed(height)
    x, y = torch.rand(2, 1, 2, height, width, generator=generator, dtype=torch.float64)
    slow = slow_ssim(x[0].numpy(), y[0].numpy(), window)
    assert float(metrics.ssim(x, y)) == pytest.approx(slow, abs=1e-12)


def slow_patch_psnr(guess, truth, height, width):
    def pieces(image):
        return [
            image[:, r : r + height, c : c + width]
            for r in range(0, image.shape[1], height)
            for c in range(0, image.shape[2], width)
        ]

    g, t = pieces(guess), pieces(truth)
    best = min(
        sum(float(((g[i] - b) ** 2).sum()) for i, b in zip(order, t, strict=True))
        for order in permutations(range(len(g)))
    )
    return -10 * log10(best / truth.numel())


def test_patch_psnr_is_the_best_of_all_orders():
    generator = torch.Generator().manual_seed(0)
    guess, truth = torch.rand(2, 3, 3, 4, 9, generator=generator, dtype=torch.float64)
    fast = metrics.patch_psnr(guess, truth, (2, 3))
    for g, t, value in zip(guess, truth, fast, strict=True):
        assert float(value) == pytest.approx(slow_patch_psnr(g, t, 2, 3), abs=1e-9)


def test_fft2d_equals_a_plain_fourier_sum():
    generator = torch.Generator().manual_seed(0)
    guess, truth = torch.rand(2, 1, 2, 3, 5, generator=generator, dtype=torch.float64)

    def spectrum(image):
        height, width = image.shape[1:]
        rows, columns = np.mgrid[:height, :width]
        waves = [
            np.exp(-2j * np.pi * (u * rows / height + v * columns / width))
            for u in range(height)
            for v in range(width)
            if (u, v) != (0, 0)
        ]
        return np.array([abs((channel * wave).sum()) for channel in image for wave in waves])

    a, b = spectrum(guess[0].numpy()), spectrum(truth[0].numpy())
    slow = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert float(metrics.fft2d(guess, truth)) == pytest.approx(slow, abs=1e-12)


def test_best_assignment_is_the_best_of_all_orders():
    generator = torch.Generator().manual_seed(0)
    for guesses, truths in [(3, 3), (5, 3), (4, 4), (1, 1), (5, 1)]:
        quality = torch.rand(guesses, truths, generator=generator, dtype=torch.float64)
        best = max(
            sum(float(quality[g, t]) for t, g in enumerate(order))
            for order in permutations(range(guesses), truths)
        )
        chosen = metrics.best_assignment(quality)
        assert float(quality[chosen, torch.arange(truths)].sum()) == pytest.approx(best)


def test_identification_equals_the_pearson_correlation_by_numpy(photos):
    guess = noisy(photos[:1], 1.0, seed=3)
    for t in range(len(photos)):
        others = [i for i in range(len(photos)) if i != t]

        def pearson(image):
            a, b = (x - x.mean((1, 2), keepdims=True) for x in (guess[0].numpy(), image.numpy()))
            return np.corrcoef(a.ravel(), b.ravel())[0, 1]

        nearest = pearson(photos[t]) > max(pearson(photos[i]) for i in others)
        assert bool(metrics.identification(guess, photos[t : t + 1], photos[others])) == nearest


@pytest.mark.parametrize(
    ("hits", "trials", "decoys"), [(0, 5, 1), (1, 1, 100), (2, 8, 9), (7, 7, 3)]
)
def test_identification_p_is_the_binomial_tail(hits, trials, decoys):
    chance = 1 / (decoys + 1)
    tail = sum(
        comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(hits, trials + 1)
    )
    assert metrics.identification_p(hits, trials, decoys) == pytest.approx(tail, rel=1e-9)
