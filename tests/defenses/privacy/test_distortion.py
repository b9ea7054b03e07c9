"""Mean squared error: no estimate comes below the bounds, and simple ones come near."""

import math

import numpy as np
import pytest

from vitguard.defenses.privacy.distortion import mse_bound, unbiased_mse_bound
from vitguard.errors import InputError

RNG = np.random.default_rng(0)


def test_error_of_equal_variances_falls_with_the_information_per_pixel():
    found = mse_bound([0.04] * 100, noise=0.5, steps=3)
    assert found == pytest.approx(0.04 * math.exp(-2 * (3 / 0.5) / 100))
    assert mse_bound([0.04] * 100, noise=0.5, steps=0) == pytest.approx(0.04)


@pytest.mark.parametrize("nats", [0.01, 0.7, 3.0, 40.0])
def test_water_filling_spends_all_information_on_the_directions_above_the_level(nats):
    variances = np.exp(RNG.normal(size=30))
    found = 30 * mse_bound(variances, noise=1 / math.sqrt(2 * nats), steps=1)
    low, high = 0.0, variances.max()
    for _ in range(200):  # the slow way: search the level
        level = (low + high) / 2
        spent = np.log(variances / np.minimum(variances, level)).sum() / 2
        low, high = (level, high) if spent > nats else (low, level)
    assert found == pytest.approx(np.minimum(variances, high).sum(), rel=1e-6)


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 5])
def test_no_best_linear_estimate_of_a_clipped_readout_comes_below_the_bound(noise, steps):
    pixels, images = 4, 100_000
    truth = RNG.normal(size=(images, pixels))
    for scale in (0.2, 0.5, 2.0):
        length = np.linalg.norm(truth, axis=1, keepdims=True) * scale
        clipped = truth * scale / np.maximum(length, 1)
        mean = clipped + noise / math.sqrt(steps) * RNG.normal(size=truth.shape)
        slope = (mean * truth).sum() / (mean**2).sum()
        error = ((slope * mean - truth) ** 2).mean() / (truth**2).mean()
        assert error > mse_bound([1.0] * pixels, noise, steps)


def test_the_bound_is_near_what_weak_signals_reach():
    noise, pixels, images = 3.0, 50, 20_000
    truth = RNG.normal(size=(images, pixels))
    clipped = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    seen = clipped + noise * RNG.normal(size=truth.shape)
    told = (seen * truth).sum() ** 2 / (seen**2).sum() / (truth**2).sum()  # by the best factor
    most = 1 - mse_bound([1.0] * pixels, noise, 1)
    assert 0.8 * most < told < 1.1 * most  # 0.002, from a million pixels


def test_sampling_tells_less():
    assert mse_bound([1.0], 1.0, 10, rate=0.1) == pytest.approx(mse_bound([1.0], 1.0, 1))


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_an_unbiased_estimate_of_the_best_readout_reaches_the_bound_and_no_readout_beats_it(noise):
    pixels, steps = 6, 3
    corners = np.array(np.meshgrid(*[[-0.5, 0.5]] * pixels)).reshape(pixels, -1).T
    bound = unbiased_mse_bound(pixels, noise, steps)
    reached = []
    for trial in range(50):
        matrix = np.eye(pixels) if trial == 0 else RNG.normal(size=(9, pixels))
        matrix = matrix / np.linalg.norm(corners @ matrix.T, axis=1).max()  # nothing is clipped
        reached.append(noise**2 * np.trace(np.linalg.inv(matrix.T @ matrix)) / pixels / steps)
    assert reached[0] == pytest.approx(bound)
    assert min(reached) >= bound * (1 - 1e-9)


def test_values_out_of_range_are_refused():
    for arguments in (([], 1.0, 1), ([0.0], 1.0, 1), ([1.0], 0.0, 1), ([1.0], 1.0, -1)):
        with pytest.raises(InputError):
            mse_bound(*arguments)
    with pytest.raises(InputError):
        mse_bound([1.0], 1.0, 1, rate=0.0)
    for arguments in ((0, 1.0), (3, -1.0), (3, 1.0, 0)):
        with pytest.raises(InputError):
            unbiased_mse_bound(*arguments)
