"""Inverting Gradients."""

from __future__ import annotations

import pytest
import timm
import torch

from vitguard import metrics
from vitguard.attacks.inverting import InvertingGradients
from vitguard.attacks.matching.distances import Cosine
from vitguard.core import Normalization
from vitguard.data import sample_images
from vitguard.errors import InputError
from vitguard.guard import protect
from vitguard.threats import CuriousServer
from vitguard.vit import Anatomy


def make_view(truth, label=2, **sizes):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **(settings | sizes))
    guard = protect(model.train(), [])
    update = guard.update(Normalization().apply(truth), torch.tensor([label]))
    return CuriousServer().view(guard, update, Normalization())


@pytest.fixture(scope="module")
def attacked():
    truth = sample_images((16, 16), count=1).pixels
    return make_view(truth), truth


def test_defaults_are_the_papers(attacked):
    view, _ = attacked
    anatomy = Anatomy.of(view.model)
    attack = InvertingGradients()
    recipe = attack.recipe(view, anatomy)
    assert (attack.iterations, attack.total_variation, attack.rate) == (24_000, 0.2, 0.1)
    assert recipe.distance == Cosine() and recipe.signed and recipe.boxed
    assert recipe.optimizer == "adam" and recipe.decay == "step"


@pytest.mark.slow
def test_it_ends_3_db_above_its_own_start_and_finds_the_label(attacked):
    view, truth = attacked
    attack = InvertingGradients.fast(iterations=120)
    generator = torch.Generator().manual_seed(0)
    start = attack.begins_at(view, torch.Generator().manual_seed(0))
    guess = attack.run(view, generator)
    gain = metrics.patch_psnr(guess.images, truth, (4, 4)) - metrics.patch_psnr(
        start, truth, (4, 4)
    )
    assert gain >= 3
    assert guess.labels.tolist() == [2]


def test_differences_and_double_backward_go_the_same_way(attacked):
    view, _ = attacked
    guesses = [
        InvertingGradients(iterations=10, derivative=d).run(view, torch.Generator().manual_seed(0))
        for d in ("exact", "difference")
    ]
    assert [g.details["derivative"] for g in guesses] == ["exact", "difference"]
    assert guesses[0].details["distance"] == pytest.approx(guesses[1].details["distance"], rel=0.05)
    assert (guesses[0].images - guesses[1].images).abs().mean() < 0.02


@pytest.mark.slow
def test_200_iterations_reach_13_5_db_matched_on_a_random_vit():
    photos = sample_images((32, 32))
    for truth in photos.pixels[:3]:
        view = make_view(truth[None], img_size=32, embed_dim=192, depth=4, num_heads=3)
        guess = InvertingGradients.fast().run(view, torch.Generator().manual_seed(0))
        assert metrics.patch_psnr(guess.images, truth[None], (4, 4)) >= 13.5


@pytest.mark.parametrize("values", [{"total_variation": -1}, {"decay": "slow"}, {"rate": 0}])
def test_settings_out_of_range_are_refused(values, attacked):
    with pytest.raises(InputError):
        InvertingGradients(**values).run(attacked[0], torch.Generator())
