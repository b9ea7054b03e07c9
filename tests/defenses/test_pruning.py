"""Pruning: exactly the largest entries survive, exactly as they were."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import small_vit
from vitguard.core import Update
from vitguard.defenses.base import Draws
from vitguard.defenses.pruning import GradientPruning
from vitguard.vit import Anatomy

ANATOMY = Anatomy.of(small_vit())


def prune(keep, tensor):
    return GradientPruning(keep).seal(Update({"a": tensor}), ANATOMY, Draws()).tensors["a"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=40), st.floats(0.001, 1))
def test_the_largest_fraction_survives_unchanged(values, keep):
    tensor = torch.tensor(values, dtype=torch.float64)
    pruned = prune(keep, tensor)
    count = max(1, round(keep * len(values)))
    survivors = sorted(map(abs, values), reverse=True)[:count]
    assert sorted(pruned.abs().tolist(), reverse=True)[:count] == survivors
    assert int((pruned != 0).sum()) <= count
    assert bool(((pruned == 0) | (pruned == tensor)).all())


def test_shape_and_precision_stay():
    pruned = prune(0.5, torch.randn(2, 3, 4).bfloat16())
    assert pruned.shape == (2, 3, 4) and pruned.dtype == torch.bfloat16


def test_one_entry_of_each_tensor_always_stays():
    assert int((prune(1e-9, torch.randn(50)) != 0).sum()) == 1


def test_pruning_stops_what_it_is_measured_against(small_vit, observe, photo, generator):
    from vitguard.attacks.position import PositionInversion
    from vitguard.metrics import psnr

    def quality(keep):
        view = observe(small_vit(), photo, defenses=f"pruning:keep={keep}")
        return float(psnr(PositionInversion().run(view, generator).images, photo))

    assert quality(1.0) > 95 and quality(0.1) < 25
