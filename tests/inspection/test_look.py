"""Crafted weights are noticed, honest ones are not."""

import math
from pathlib import Path

import pytest
import timm
import torch

from tests.inspection.crafts import PUBLISHED, imprint
from vitguard.defenses.inspecting import InspectWeights
from vitguard.errors import Incompatible, InputError, SuspiciousWeights
from vitguard.guard import protect
from vitguard.inspection import SIGNS, Memory, inspect_model, inspect_weights
from vitguard.threats.malicious_server import craft_types
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


@pytest.mark.parametrize("craft", craft_types())
def test_every_craft_of_the_package_is_suspicious_by_its_weights_alone(craft):
    model = make(patch_size=4)
    weights = craft_types()[craft]().weights(model)
    found = inspect_weights(weights, Anatomy.of(model), Memory())
    assert found.suspicious and found.score > 4, found


def stack_of_layers():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 1, 2, 24, 48, num_classes=10)
    torch.nn.init.normal_(model.heads.head.weight, std=0.02)  # zeros in torchvision
    return model


def head_behind_pooling():
    sizes = {"depths": (1, 1), "embed_dim": 16, "num_heads": (2, 2), "window_size": 2}
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, img_size=32, num_classes=10, **sizes)


@pytest.mark.parametrize("make_model", [stack_of_layers, head_behind_pooling])
def test_a_head_whose_layer_has_a_longer_name_is_looked_at_by_its_weights_alone(make_model):
    model = make_model()
    anatomy = Anatomy.of(model)
    own = inspect_weights(model.state_dict(), anatomy, Memory())
    assert not own.suspicious, own
    found = inspect_weights(craft_types()["fishing"]().weights(model), anatomy, Memory())
    assert {"scaled row", "head bias"} <= {s.name for s in found.worst}, found


def test_a_model_whose_blocks_are_not_known_is_not_said_to_have_been_inspected():
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [1], "embed_dim": 16, "num_heads": [2], "window_size": 4}
    settings = transformers.SwinConfig(image_size=32, patch_size=4, num_labels=10, **sizes)
    model = transformers.SwinForImageClassification(settings)
    assert not Anatomy.of(model).blocks
    with pytest.raises(Incompatible, match="whose blocks are known"):
        protect(model, []).inspect({}, *batch())


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
    assert {"lone token in pairs", "steep units"} <= {s.name for s in found.worst}


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


def test_the_page_lists_every_sign_with_its_limit():
    page = (Path(__file__).parents[2] / "docs" / "inspection.md").read_text()
    for name, (limit, meaning) in SIGNS.items():
        shown = "none" if math.isinf(limit) else f"{limit:g}"
        assert f"| {name} | {meaning} | {shown} |" in page


def test_bins_in_the_hidden_layer_of_a_head_are_suspicious_and_honest_ones_are_not():
    model = make()
    model.head = torch.nn.Sequential(
        torch.nn.Linear(48, 96), torch.nn.GELU(), torch.nn.Linear(96, 10)
    )
    guard = protect(model, [])
    assert not guard.inspect({}, *batch()).suspicious
    weights = {n: t.clone() for n, t in guard.export().items()}
    weights["head.0.weight"][:] = torch.randn(48)
    weights["head.0.bias"][:] = torch.linspace(-1, 1, 96)
    found = guard.inspect(weights, *batch())
    assert {"parallel rows", "ordered biases"} <= {s.name for s in found.worst}
    assert "head.0" in found.reason
    other = dict(sorted(weights.items(), reverse=True))  # a server chooses the order
    assert inspect_weights(other, Anatomy.of(model), Memory()).suspicious


def test_bins_in_the_mlp_of_a_pooling_attention_are_suspicious():
    model = make(global_pool="map", class_token=False)
    guard = protect(model, [])
    assert not guard.inspect({}, *batch()).suspicious
    weights = {n: t.clone() for n, t in guard.export().items()}
    weights["attn_pool.mlp.fc1.weight"][:] = torch.randn(48)
    found = guard.inspect(weights, *batch())
    assert found.suspicious and "attn_pool.mlp.fc1" in found.reason


def test_bins_before_the_last_layer_of_a_head_of_torchvision_are_suspicious():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10, representation_size=48)
    torch.nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # zeros there have no gradient
    guard = protect(model, [])
    assert not guard.inspect({}, *batch()).suspicious
    weights = {n: t.clone() for n, t in guard.export().items()}
    weights["heads.pre_logits.weight"][:] = torch.randn(48)
    assert guard.inspect(weights, *batch()).suspicious


@pytest.mark.parametrize("muted", ["fc1", "values"])
def test_a_branch_that_is_muted_before_its_last_layer_is_suspicious(muted):
    guard = protect(make(), [])
    weights = {n: t.clone() for n, t in guard.export().items()}
    if muted == "fc1":
        weights["blocks.1.mlp.fc1.weight"] *= 1e-4
    else:
        weights["blocks.1.attn.qkv.weight"][96:] *= 1e-4
    found = guard.inspect(weights, *batch())
    assert [s.name for s in found.worst] == ["muted branch"] and "blocks.1" in found.reason


def test_what_is_no_number_hides_no_other_sign():
    from vitguard.inspection.signs import largest

    places = [("a", 1.0), ("b", math.nan), ("c", 100.0)]
    for order in (places, places[::-1], places[1:] + places[:1]):
        (sign,) = largest("scaled row", order)
        assert sign.where == "b" and sign.excess == math.inf


def test_a_model_of_which_nothing_is_trained_is_inspected_by_its_weights():
    guard = protect(make().requires_grad_(False), [])
    found = guard.inspect({}, *batch())
    assert not found.suspicious and "no parameter is trained" in str(found)
    assert guard.inspect(imprint(make()), *batch()).suspicious


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_an_inspection_works_wherever_gradients_are_off(outer):
    model, (images, labels) = make(), batch()
    crafted = PUBLISHED["imprint"](model) if "imprint" in PUBLISHED else imprint(model)
    guard = protect(model, [])
    known = guard.inspect(crafted, images, labels)
    with outer():
        made = {name: tensor.clone() for name, tensor in crafted.items()}
        found = guard.inspect(made, images.clone(), labels.clone())
        assert not guard.inspect({}, *batch()).suspicious
    assert found.suspicious and {s.name for s in found.signs} == {s.name for s in known.signs}


def test_shares_of_patches_that_were_not_looked_at_are_told():
    def noted(size):
        found = protect(make(depth=1, img_size=16), []).inspect(
            {}, torch.randn(size, 3, 16, 16), torch.arange(size)
        )
        looked = any(s.name.startswith("lone token") for s in found.signs)
        return looked, [n for n in found.notes if "patches" in n]

    looked, (note,) = noted(3)
    assert not looked and "12 patches" in note and "16" in note
    assert noted(4) == (True, [])


def test_a_model_made_in_inference_mode_is_one_clear_error():
    with torch.inference_mode():
        model = make()
    with pytest.raises(InputError, match="inference"):
        protect(model, []).inspect({}, *batch())


def test_buffers_are_no_weights_and_the_inspection_says_so():
    model = make()
    model.register_buffer("running_var", torch.ones(3))
    model.register_buffer("count", torch.tensor(1))
    model.register_buffer("own", torch.ones(3), persistent=False)
    guard = protect(model, [])
    found = guard.inspect({}, *batch())
    assert not found.suspicious
    (note,) = [n for n in found.notes if "buffer" in n]
    assert "(running_var)" in note and note in str(found)
    for bad in (math.nan, math.inf):
        found = guard.inspect({"running_var": torch.full((3,), bad)}, *batch())
        assert found.suspicious and found.worst[0].where == "running_var"


def test_a_client_that_inspects_refuses_buffers_that_are_no_numbers():
    model = make()
    model.register_buffer("running_var", torch.full((3,), math.nan))
    with pytest.raises(SuspiciousWeights, match="running_var"):
        protect(model, [InspectWeights()]).update(*batch())
