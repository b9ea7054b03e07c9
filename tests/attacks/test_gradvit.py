"""GradViT."""

from __future__ import annotations

import pytest
import torch

from vitguard import metrics
from vitguard.attacks.gradvit import GradViT
from vitguard.errors import InputError
from vitguard.vit import Anatomy


def test_defaults_are_the_papers(attacked):
    view, _ = attacked([2])
    anatomy = Anatomy.of(view.model)
    attack = GradViT()
    recipe = attack.recipe(view, anatomy)
    assert attack.iterations == 120_000 and recipe.decay == "cosine" and attack.rate == 0.1
    assert recipe.weight == ((0.0, 4e-3), (0.5, 2e-3))
    weights = {name: schedule[-1][1] for name, _, schedule in recipe.priors}
    assert weights == {
        "patch borders": 1e-4,
        "total variation": 1e-4,
        "pixel norm": 1e-4,
        "registration": 1e-2,
    }


def test_the_switch_at_half_time_halves_the_gradient_and_brings_in_the_features(attacked):
    view, _ = attacked([2])
    recipe = GradViT().recipe(view, Anatomy.of(view.model))
    assert recipe.phase(0.49)[0] == 4e-3 and recipe.phase(0.5)[0] == 2e-3
    assert recipe.phase(0.0)[4] == 0 and recipe.phase(0.4)[4] == 1e-2


@pytest.mark.slow
def test_it_ends_3_db_above_its_own_start(attacked):
    view, truth = attacked([2])
    attack = GradViT.fast(iterations=300, restarts=1)
    start = attack.begins_at(view, torch.Generator().manual_seed(0))
    guess = attack.run(view, torch.Generator().manual_seed(0))
    gain = metrics.patch_psnr(guess.images, truth, (4, 4)) - metrics.patch_psnr(
        start, truth, (4, 4)
    )
    assert gain >= 3
    assert guess.labels.tolist() == [2]
    assert guess.details["dropped"] == [
        "feature statistics: no pretrained CNN was given",
        "registration: one restart",
    ]


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError):
        GradViT(patch=-1)
