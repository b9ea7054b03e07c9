"""Crafted weights are noticed, honest ones are not."""

import math

import pytest
import timm
import torch

from tests.inspection.crafts import PUBLISHED, imprint
from vitguard.defenses.inspecting import InspectWeights
from vitguard.errors import InputError
from vitguard.guard import protect
from vitguard.inspection import SIGNS, Memory, inspect_model
from vitguard.vit import Anatomy

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def make(seed=0, **more):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model("vit_tiny_patch16_224", num_classes=10, **{**SIZES, **more})


def batch(size=4, seed=0):
    images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return images, torch.arange(size) % 10


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("craft", PUBLISHED)
def test_published_crafts_are_suspicious_and_the_reason_names_where(craft, size):
    model = make()
    weights = PUBLISHED[craft](model)
    own = model.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in weights.items()} == {
        n: (t.shape, t.dtype) for n, t in own.items()
    }
    found = protect(model, []).inspect(weights, *batch(size))
    assert found.suspicious
    assert found.score > 1
    assert found.worst[0].where in found.reason and found.worst[0].name in found.reason


@pytest.mark.parametrize("size", [1, 4])
def test_honest_weights_are_not_suspicious_and_nothing_says_that_they_are_safe(size):
    found = protect(make(), []).inspect({}, *batch(size))
    assert not found.suspicious
    assert "no signs of a known craft" in found.reason
    assert "safe" not in str(found).lower() and "secure" not in str(found).lower()
    assert any("first round" in note for note in found.notes)
    assert {s.name for s in found.signs} <= SIGNS.keys()


@pytest.mark.parametrize("size", [1, 4])
def test_the_gradient_alone_tells_an_imprint(size):
    """Of a craft whose weights look honest, single tokens in single rows remain."""
    model = make()
    model.load_state_dict(imprint(model))
    found = inspect_model(model, Anatomy.of(model), *batch(size), Memory())
    assert {"lone token in pairs", "steep units"} & {s.name for s in found.worst}


def test_weights_that_are_no_numbers_are_suspicious():
    model = make()
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    weights["blocks.0.mlp.fc1.weight"][3, 4] = math.nan
    found = protect(model, []).inspect(weights, *batch())
    assert found.suspicious and "no numbers" in found.reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"strange": torch.zeros(1)},
        {"head.bias": torch.zeros(11)},
        {"head.bias": torch.zeros(10, dtype=torch.float64)},
        [1],
    ],
)
def test_other_names_shapes_and_types_are_refused(wrong):
    with pytest.raises(InputError):
        protect(make(), []).inspect(wrong, *batch())


def test_an_inspection_changes_neither_the_model_nor_its_gradients():
    model = make()
    guard = protect(model, [])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    guard.inspect(imprint(model), *batch())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_larger_limit_lets_more_pass():
    guard = protect(make(), [])
    found = guard.inspect(imprint(make()), *batch(), limit=1e40)
    assert not found.suspicious and found.score > 1


def of_torchvision():
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96,
        num_classes=10,
    )  # fmt: skip


def of_transformers():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


@pytest.mark.parametrize("build", [of_torchvision, of_transformers])
def test_models_of_other_libraries_are_inspected(build):
    torch.manual_seed(0)
    model = build()
    guard = protect(model, [])
    honest = guard.inspect({}, *batch())
    assert not honest.suspicious
    crafted = guard.inspect(imprint(model), *batch())
    assert crafted.suspicious
    assert {"parallel rows", "steep units"} <= {s.name for s in crafted.worst}
    assert {s.name for s in honest.signs} >= {"logit spread", "steep units", "lone sample"}


def test_fine_tuning_by_low_rank_matrices_is_not_suspicious():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    model = peft.get_peft_model(make(), config)
    guard = protect(model, [InspectWeights()])
    found = guard.inspect({}, *batch())
    assert not found.suspicious, found
    guard.model.train()
    guard.update(*batch())
