"""APRIL: exact where it is proven, and silent everywhere else."""

from dataclasses import replace

import pytest
import torch

from vitguard.attacks.april import April
from vitguard.errors import Blocked, NotApplicable
from vitguard.metrics import psnr
from vitguard.models import AprilViT


@pytest.fixture(scope="module")
def proven():
    torch.manual_seed(0)
    return AprilViT(16, 4, 96, 2, 4, 10)


@pytest.fixture(scope="module")
def narrow():
    """A patch of 192 pixels in 96 dimensions: x is sought in the patch gradient's row space."""
    torch.manual_seed(0)
    return AprilViT(16, 8, 96, 2, 4, 10)


def test_exact_on_the_architecture_of_its_proof(proven, narrow, observe, photo, generator):
    for model in (proven, narrow):
        guess = April().run(observe(model, photo), generator)
        assert float(psnr(guess.images, photo)) > 60
        assert guess.details["residual"] < 1e-4
        assert guess.labels.tolist() == [0]


def test_not_applicable_to_a_pre_norm_residual_vit(small_vit, observe, photo, generator):
    with pytest.raises(NotApplicable, match="norm before its attention"):
        April().run(observe(small_vit(), photo), generator)


def test_not_applicable_to_a_batch(proven, observe, photos, generator):
    with pytest.raises(NotApplicable, match="batch of 2"):
        April().run(observe(proven, photos[:2]), generator)


@pytest.mark.parametrize(
    ("withhold", "name"),
    [("position", "pos_embed"), ("qkv", "blocks.0.attn.qkv.weight")],
)
def test_a_hidden_gradient_blocks_by_its_name(proven, observe, photo, generator, withhold, name):
    with pytest.raises(Blocked) as caught:
        April().run(observe(proven, photo, withhold=(withhold,)), generator)
    assert caught.value.name == name


def test_fixed_positions_block_it(proven, observe, photo, generator):
    with pytest.raises(Blocked, match="pos_embed"):
        April().run(observe(proven, photo, defenses="positions:kind=frozen"), generator)


def test_where_patches_are_wide_the_patch_gradient_is_needed(narrow, observe, photo, generator):
    with pytest.raises(Blocked, match=r"patch_embed\.proj\.weight"):
        April().run(observe(narrow, photo, withhold=("patch",)), generator)


def test_not_applicable_where_each_layer_has_a_factor_of_its_own(proven, observe, photo, generator):
    view = observe(proven, photo)
    view = replace(view, traits=replace(view.traits, layerwise=True))
    with pytest.raises(NotApplicable, match="factor of its own"):
        April().run(view, generator)
