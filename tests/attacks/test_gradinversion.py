"""GradInversion."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitguard import metrics
from vitguard.attacks.gradinversion import GradInversion
from vitguard.attacks.matching.priors import FeatureStatistics
from vitguard.attacks.matching.run import Run
from vitguard.errors import InputError
from vitguard.vit import Anatomy


def test_defaults_are_the_papers(attacked):
    view, _ = attacked([2])
    anatomy = Anatomy.of(view.model)
    attack = GradInversion()
    recipe = attack.recipe(view, anatomy)
    assert attack.iterations == 20_000 and attack.rate == 0.1
    assert recipe.weight == ((0.0, 1e-4),) and 0.01 <= recipe.langevin <= 0.2
    weights = {name: schedule[-1][1] for name, _, schedule in recipe.priors}
    assert weights == {"total variation": 1e-4, "pixel norm": 1e-6, "group consistency": 0.01}
    group = next(schedule for name, _, schedule in recipe.priors if name == "group consistency")
    assert group[0][0] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_without_a_network_the_feature_statistics_are_off_and_it_says_so(attacked):
    view, _ = attacked([2, 7])
    guess = GradInversion.fast(iterations=1, restarts=1).run(view, torch.Generator())
    assert len(guess.details["dropped"]) == 2
    network = FeatureStatistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    attack = GradInversion.fast(iterations=2, network=network)
    terms = {}
    attack = GradInversion.fast(
        iterations=2, network=network, watch=lambda progress: terms.update(progress.terms)
    )
    assert "dropped" not in attack.run(view, torch.Generator()).details
    assert terms["feature statistics"] > 0


@pytest.mark.slow
def test_it_ends_3_db_above_its_own_start(attacked):
    view, truth = attacked([2, 7])
    attack = GradInversion.fast(iterations=80)
    start = attack.begins_at(view, torch.Generator().manual_seed(0))
    guess = attack.run(view, torch.Generator().manual_seed(0))
    gain = (
        metrics.score(guess.images, truth, (4, 4)).patch_psnr
        - metrics.score(start, truth, (4, 4)).patch_psnr
    )
    assert gain.mean() >= 3


@pytest.mark.slow
def test_restarts_are_drawn_together(attacked):
    view, _ = attacked([2, 7])
    spread = {}
    for weight in (0.0, 10.0):
        attack = GradInversion.fast(iterations=30, group=weight, langevin=0.0)
        run = Run(attack, view, torch.Generator().manual_seed(0))
        run.go()
        first, second = (r.images() for r in run.restarts)
        spread[weight] = float((first - second).square().mean())
    assert spread[10.0] < 0.5 * spread[0.0]


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError):
        GradInversion(gradient=-1)
