"""Deep tokens: a later block gives the image away where the first ones send nothing."""

import pytest
import torch

from tests.conftest import CIFAR_NORMALIZATION
from vitguard.attacks.deep_tokens import DeepTokens
from vitguard.attacks.deep_tokens import attack as deep
from vitguard.attacks.ladder import Ladder
from vitguard.core import Normalization
from vitguard.errors import Blocked, NotApplicable
from vitguard.metrics import psnr
from vitguard.plan import plan_report

STEM = ("embedding", r"^blocks\.0\.")


def crop(cifar, index):
    return cifar[0][index : index + 1, :, 8:16, 8:16], cifar[1][index : index + 1]


@pytest.fixture
def narrow(small_vit):
    """4 patches of 4 x 4 pixels: seconds instead of minutes."""
    return small_vit(img_size=8, depth=3, embed_dim=64)


@pytest.mark.parametrize("index", [1, 21])
def test_a_frozen_stem_does_not_hide_the_image(cifar, narrow, observe, index):
    pixels, labels = crop(cifar, index)
    view = observe(narrow, pixels, labels, withhold=STEM, normalization=CIFAR_NORMALIZATION)
    guess = DeepTokens().run(view, torch.Generator().manual_seed(0))
    assert guess.details["block"] == 1 and guess.details["found"] == 5
    assert float(psnr(guess.images, pixels)) > 60, guess.details
    assert bool(guess.verified.all())


def test_what_is_found_is_not_verified_on_an_unrelated_gradient(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels, withhold=STEM)
    draw = torch.Generator().manual_seed(3)
    for name, tensor in view.update.tensors.items():
        view.update.tensors[name] = torch.randn(tensor.shape, generator=draw) * tensor.std()
    with pytest.raises(NotApplicable, match="no token"):
        DeepTokens(seconds=5.0).run(view, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("what", ["a token is missing", "the image makes others"])
def test_nothing_is_verified_where_a_token_is_missing_or_the_image_makes_others(
    cifar, narrow, observe, monkeypatch, what
):
    search, invert = deep._search, deep.Stem.invert
    if what == "a token is missing":
        monkeypatch.setattr(deep, "_search", lambda *given: search(*given)[:-1])
    else:
        monkeypatch.setattr(
            deep.Stem, "invert", lambda *given, **named: 0.9 * invert(*given, **named)
        )
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels, withhold=STEM, normalization=CIFAR_NORMALIZATION)
    guess = DeepTokens().run(view, torch.Generator().manual_seed(0))
    assert guess.verified is not None and not bool(guess.verified.any())


def test_it_says_what_it_cannot_do(cifar, small_vit, narrow, observe, photos):
    draw = torch.Generator().manual_seed(0)
    pixels, labels = crop(cifar, 1)
    with pytest.raises(Blocked):
        DeepTokens().run(observe(narrow, pixels, labels, withhold=("mlp",)), draw)
    with pytest.raises(NotApplicable, match="batch"):
        DeepTokens().run(observe(small_vit(), photos[:2]), draw)
    with pytest.raises(NotApplicable, match="fill the spans"):
        DeepTokens().run(observe(small_vit(embed_dim=16), photos[:1]), draw)


def test_the_budget_is_work_and_is_kept(cifar, small_vit, observe, photos):
    view = observe(small_vit(depth=3), photos[:1], withhold=STEM, normalization=Normalization())
    with pytest.raises(NotApplicable, match=r"budget|no token"):
        DeepTokens(seconds=0.5).run(view, torch.Generator().manual_seed(0))


def test_plan_names_it_where_a_later_block_is_plain(narrow):
    left = plan_report(narrow, ("embedding", r"^blocks\.0\.")).remaining()
    assert "token-search" in left
    assert "token-search" not in plan_report(narrow, "mlp").remaining()


def test_the_ladder_climbs_to_it_where_the_first_block_sends_nothing(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels, withhold=STEM, normalization=CIFAR_NORMALIZATION)
    guess = Ladder().run(view, torch.Generator().manual_seed(0))
    assert guess.details["rung"] == "deep-tokens", guess.details["rungs"]
    assert float(psnr(guess.images, pixels)) > 60


def test_it_costs_the_ladder_nothing_where_the_first_block_is_read(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels)
    assert DeepTokens().share(view) == 0
    assert "deep-tokens" not in Ladder().run(view, torch.Generator()).details["rungs"]
