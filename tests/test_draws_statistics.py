"""The Gaussian numbers pass the statistics of benchmarks/randomness.py; planted faults do not."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vitguard.draws import Draws
from vitguard.errors import InputError


def benchmark(name):
    """Import one of the scripts under benchmarks/."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


randomness, rounding = benchmark("randomness"), benchmark("rounding")

ALARM = 1e-6  # a sound source fails this often
MANY = 8 * randomness.CHUNK  # 8.4 million: a variance off by 0.5 % is 10 deviations away


def less_bits(count):
    """Box-Muller from uniforms of 24 bits, as float32 libraries do it: no number beyond 5.77."""
    words = np.frombuffer(randomness.Draws().words(count).tobytes(), np.uint64)
    uniform = ((words >> np.uint64(40)) * 2.0**-24).reshape(-1, 2, randomness.BLOCK // 2)
    radius = np.sqrt(-2 * np.log1p(-uniform[:, 0]))
    angle = 2 * math.pi * uniform[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def repeated(count):
    """One block of 16,384 numbers comes twice, far apart."""
    numbers = randomness.own(count).copy()
    numbers[-randomness.BLOCK :] = numbers[: randomness.BLOCK]
    return numbers


def correlated(count):
    """Each number has a correlation of 1 % with the third before it."""
    numbers = randomness.own(count)
    return math.sqrt(1 - 1e-4) * numbers + 0.01 * np.roll(numbers, 3)


@pytest.mark.slow
def test_the_source_passes_every_statistic():
    found = randomness.tally(randomness.own, MANY)
    assert randomness.verdict(found) > ALARM, found


@pytest.mark.parametrize("deviation", [1.0, 3.7])
def test_noise_on_the_grid_has_the_bin_probabilities_of_the_normal_distribution(deviation):
    assert randomness.grid_p(2 * randomness.CHUNK, deviation) > ALARM


@pytest.mark.parametrize(
    ("fault", "numbers", "finder"),
    [
        (lambda n: randomness.own(n) * math.sqrt(1.005), MANY, "moment 2"),
        (repeated, randomness.CHUNK, "equal numbers"),
        (less_bits, randomness.CHUNK, "radius past bit 24"),
        (lambda n: np.clip(randomness.own(n), -4.5, 4.5), MANY // 2, "beyond 4.5"),
        (correlated, randomness.CHUNK, "lag 3"),
    ],
    ids=["variance", "repeated-block", "24-bit-uniforms", "tail-cut", "correlation"],
)
def test_a_planted_fault_is_found(fault, numbers, finder):
    found = randomness.tally(fault, numbers)
    assert randomness.verdict(found) < ALARM
    assert found[finder] < 1e-3, found


# --- rounding


def test_the_error_of_a_number_is_within_the_bound_of_the_rounding_argument():
    worst, share = rounding.errors(1 << 18)
    assert 0 < share <= 1
    assert worst < 1e-9


def test_rounding_costs_what_the_docs_say():
    cost = rounding.extra(86e6, 1e4)
    assert cost.epsilon < 3.6e-3
    assert cost.delta < 1e-11


def test_low_bits_tell_neighbours_apart_in_plain_float_noise_and_not_on_the_grid():
    plain = rounding.distinguished(rounding.plain, 100_000)
    assert plain[0.0] > 0.1
    assert plain[1.0] == 0
    assert rounding.distinguished(rounding.gridded, 100_000) == {0.0: 0.0, 1.0: 0.0}


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e-6, 12345.678])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_release_is_a_multiple_of_the_grid_whatever_it_hides(value, dtype):
    for deviation in (1.0, 3.7, 1e-6):
        grid = 2.0 ** math.floor(math.log2(deviation / 1024))
        total = torch.full((4096,), value * deviation, dtype=dtype)
        steps = randomness.Draws().noised(total, deviation).double() / grid
        assert torch.equal(steps, steps.round())
        assert deviation / 2048 < grid <= deviation / 1024


@pytest.mark.parametrize("word", [1, 3, 200, 2**20, 2**31])
def test_the_far_tail_has_no_gaps(monkeypatch, word):
    """Where one coordinate is next to nothing the other decides, and it has 63 bits."""
    generator = np.random.default_rng(0)

    class Rare:
        def update_into(self, zeros, words):
            half = len(zeros) // 16
            other = generator.integers(2**40, 2**41, half)
            words[: 16 * half] = np.concatenate([np.full(half, word), other]).tobytes()

    monkeypatch.setattr(randomness.Draws, "_stream", lambda self: Rare())
    numbers = randomness.own(randomness.BLOCK)
    radii = np.abs(numbers[randomness.BLOCK // 2 :])
    assert len(np.unique(radii)) > 0.99 * len(radii)
    # radii from 2^-23 to 2^-22 of the disc: beyond 7.8 deviations, and as dense as exact numbers
    assert 7.8 < radii.min() < radii.max() < 8
    assert np.diff(np.sort(radii)).max() < 2.0**-11  # a cell of the grid


@pytest.mark.parametrize("count", [(5,), torch.Size([200]), 2.0, True, -1, None])
def test_a_count_of_draws_is_a_whole_number(count):
    for draw in (Draws().words, Draws().uniform, lambda n: Draws().chosen(n, 1.0)):
        with pytest.raises(InputError, match="a count of draws"):
            draw(count)
