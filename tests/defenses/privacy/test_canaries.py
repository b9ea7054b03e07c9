"""Canary audits of every path by which a private gradient leaves; few trials, much confidence."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import Probed
from tests.fast import crossed, fast_for
from vitguard.defenses.privacy import probe
from vitguard.errors import Unprotected
from vitguard.guard import protect

pytest.importorskip("opacus")

NOISE = 1 / 6  # a large mu, so that few trials tell it from twice as much
SURE = 1 - 1e-8  # of the sound paths: a false alarm once in 10^8 runs
TRIALS = {"none": 60, "noise halved": 80, "clip doubled": 80, "noise reused": 40}


def benchmark(name):
    """Import one of the scripts under benchmarks/."""
    path = Path(__file__).parents[3] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


canaries = benchmark("canaries")

LONG = ("resumed", "physical_batch", "forked")  # as another, with more work in each trial


@pytest.fixture
def audited(monkeypatch):
    """`audit` of a path; the models of its releases, all of one kind, are tried out once."""
    monkeypatch.setattr(probe, "_PROBED", Probed(probe._PROBED))
    return _audited


def _audited(path, fault, confidence):
    if path == "forked" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    bound = canaries.audit(path, NOISE, TRIALS[fault], fault, confidence)
    return bound, canaries.gaussian_epsilon(1 / NOISE, canaries.DELTA)


# on the other paths a planted fault is found, by the same audit
@pytest.mark.slow
@pytest.mark.parametrize("path", fast_for(canaries.PATHS, fast=["client"]))
def test_no_lower_bound_exceeds_what_is_claimed(path, audited):
    bound, claim = audited(path, "none", SURE)
    assert bound.epsilon <= claim
    assert bound.ratio == pytest.approx(1 / NOISE, rel=0.4)  # the canary is there to be seen


FAULTS = [f for f in canaries.FAULTS if f != "none"]


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        *crossed([p for p in canaries.PATHS if p not in LONG], FAULTS),
        *(pytest.param(p, f, marks=pytest.mark.slow) for p in LONG for f in FAULTS),
    ],
)
def test_a_planted_fault_is_found_on_every_path(path, fault, audited):
    bound, claim = audited(path, fault, 0.95)
    assert bound.epsilon > claim


def test_gradients_of_several_batches_before_one_step_are_refused():
    """Accumulation has no audit: the sum of two batches would hold a record twice."""
    scene = canaries.Scene.of(NOISE)
    guard = protect(scene.model, [scene.private()])
    optimizer = torch.optim.SGD(scene.model.parameters(), lr=0.0)
    data = TensorDataset(scene.images.repeat(8, 1, 1, 1), scene.labels.repeat(8))
    optimizer, loader = guard.prepare(optimizer, DataLoader(data, batch_size=8))
    batches = iter(loader)
    with pytest.raises(Unprotected):
        for _ in range(2):
            images, labels = next(batches)
            F.cross_entropy(scene.model(images), labels).backward()
        optimizer.step()
