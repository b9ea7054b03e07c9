"""The Gaussian numbers pass the statistics of benchmarks/randomness.py; planted faults do not."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest


def benchmark(name):
    """Import one of the scripts under benchmarks/."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


randomness = benchmark("randomness")

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
        (lambda n: np.clip(randomness.own(n), -4.5, 4.5), MANY, "beyond 4.5"),
        (correlated, randomness.CHUNK, "lag 3"),
    ],
    ids=["variance", "repeated-block", "24-bit-uniforms", "tail-cut", "correlation"],
)
def test_a_planted_fault_is_found(fault, numbers, finder):
    found = randomness.tally(fault, numbers)
    assert randomness.verdict(found) < ALARM
    assert found[finder] < 1e-3, found
