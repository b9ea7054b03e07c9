"""The private step's memory beside a plain one, as the benchmark measures it."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("opacus")


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[3] / "benchmarks" / "privacy.py"
    spec = importlib.util.spec_from_file_location("privacy_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["32", "224"])
def test_peak_memory_of_a_private_step_is_at_most_1_05_of_a_plain_one(benchmark, setting):
    peaks = {}
    for name in ("SGD", "vitguard"):
        step = benchmark.METHODS[name](setting)
        step()
        step()
        peaks[name] = benchmark.peak_memory(step)
    assert peaks["vitguard"] <= 1.05 * peaks["SGD"]
