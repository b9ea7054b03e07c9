"""Anatomy: names and sizes of the models we say we know, and what is wrong with the others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitguard.errors import InputError, NotApplicable, UnsupportedModel
from vitguard.selectors import SELECTORS
from vitguard.vit import (
    Anatomy,
    canonical_name,
    canonical_parameters,
    logits_of,
    math_attention,
)


@pytest.mark.parametrize(
    ("seen", "base"),
    [
        ("blocks.0.norm1.weight", "blocks.0.norm1.weight"),
        ("module.blocks.0.norm1.weight", "blocks.0.norm1.weight"),
        ("_orig_mod.module.pos_embed", "pos_embed"),
        ("module._orig_mod._module.pos_embed", "pos_embed"),
        ("base_model.model.head.base_layer.weight", "head.weight"),
        ("blocks.0._orig_mod.attn.qkv.weight", "blocks.0.attn.qkv.weight"),
    ],
)
def test_names_seen_through_wrappers_are_the_base_models(seen, base):
    assert canonical_name(seen) == base


def test_canonical_parameters_are_the_trainable_ones(small_vit):
    model = small_vit()
    model.head.requires_grad_(False)
    names = canonical_parameters(nn.DataParallel(model))
    assert "pos_embed" in names and "head.weight" not in names


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)
)
def test_patchify_is_what_a_patch_convolution_reads(rows, columns, high, wide, channels):
    anatomy = Anatomy(
        "hand", "proj", "proj", None, 0, (), None, (), (), (rows * high, columns * wide),
        (high, wide), channels, 7, 2,
    )  # fmt: skip
    images = torch.randn(2, channels, rows * high, columns * wide, dtype=torch.float64)
    patches = anatomy.patchify(images)
    assert patches.shape == (2, anatomy.patches, anatomy.patch_pixels)
    assert torch.equal(anatomy.unpatchify(patches), images)
    convolution = nn.Conv2d(channels, 7, (high, wide), (high, wide)).double()
    tokens = patches @ convolution.weight.flatten(1).T + convolution.bias
    assert torch.allclose(tokens, convolution(images).flatten(2).mT)


def test_every_parameter_has_one_role_and_the_expected_one(small_vit):
    model = small_vit(reg_tokens=2, init_values=0.1)
    anatomy = Anatomy.of(model)
    names = [n for n, _ in model.named_parameters()]
    chosen = {role: anatomy.select(role, names) for role in SELECTORS}
    assert chosen["all"] == names
    assert chosen["embedding"] == ["cls_token", "reg_token", "pos_embed", *chosen["patch"]]
    assert chosen["position"] == ["pos_embed"]
    assert chosen["patch"] == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert "blocks.1.attn.proj.weight" in chosen["attention"]
    assert "blocks.0.mlp.fc2.bias" in chosen["mlp"]
    assert chosen["head"] == ["head.weight", "head.bias"]
    assert "blocks.0.norm2.weight" in chosen["norm"] and "norm.weight" in chosen["norm"]
    each = [n for role in SELECTORS if role not in ("embedding", "all") for n in chosen[role]]
    assert len(each) == len(set(each))
    assert {n for n in names if n not in each} == {
        f"blocks.{i}.ls{j}.gamma" for i in (0, 1) for j in (1, 2)
    }


def test_a_selector_may_be_a_regular_expression_that_matches(small_vit):
    anatomy = Anatomy.of(small_vit())
    assert anatomy.select(r"blocks\.0\..*qkv", ["blocks.0.attn.qkv.weight", "head.weight"]) == [
        "blocks.0.attn.qkv.weight"
    ]
    for wrong in ("nothing like it", "(unclosed", ""):
        with pytest.raises(InputError):
            anatomy.select(wrong, ["head.weight"])


def test_a_role_among_alternatives_is_no_pattern(small_vit):
    anatomy = Anatomy.of(small_vit())
    names = ["patch_embed.proj.weight", "pos_embed", "head.weight"]
    with pytest.raises(InputError, match="the role 'embedding' would be read as a pattern"):
        anatomy.select("embedding|head", names)
    assert anatomy.select(r"(embed|head)\.weight", names) == ["head.weight"]


def test_an_unknown_model_is_told_what_was_looked_for():
    with pytest.raises(UnsupportedModel, match=r"patch_embed\.proj.*Anatomy by hand"):
        Anatomy.of(nn.Sequential(nn.Linear(2, 2)))


def timm_model(name, **arguments):
    import timm

    return timm.create_model(name, num_classes=10, **arguments)


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "window_size": 4, "depths": (1, 1, 1, 1)},
            "norm inside the patch embedding",
        ),
        ("vit_base_patch16_clip_224", SMALL, "norm between the embedding and the first block"),
        ("vit_tiny_patch16_224", {**SMALL, "patch_drop_rate": 0.5}, "patch dropout"),
        ("samvit_base_patch16", SMALL, "position embedding with 4 dimensions"),
        ("vit_tiny_r_s16_p8_224", {"img_size": 32, "depth": 1}, "convolutional network"),
    ],
)
def test_recognised_models_whose_embedding_is_not_plain_say_why(name, arguments, why):
    anatomy = Anatomy.of(timm_model(name, **arguments))
    with pytest.raises(NotApplicable, match=why):
        anatomy.require_plain_embedding()


def test_a_patch_convolution_that_overlaps_is_an_obstacle(small_vit):
    model = small_vit()
    model.patch_embed.proj.stride = (2, 2)
    with pytest.raises(NotApplicable, match="overlap"):
        Anatomy.of(model).require_plain_embedding()


@pytest.mark.parametrize("name", ["mvitv2_tiny", "resnet18", "mixer_s16_224"])
def test_models_of_another_kind_are_unsupported_not_a_crash(name):
    with pytest.raises(UnsupportedModel):
        Anatomy.of(timm_model(name))


@pytest.mark.parametrize("block", ["ParallelScalingBlock", "ParallelThingsBlock"])
def test_parallel_blocks_leave_no_block_to_attack_but_the_embedding_stays(block):
    from timm.models import vision_transformer

    anatomy = Anatomy.of(
        timm_model("vit_tiny_patch16_224", **SMALL, block_fn=getattr(vision_transformer, block))
    )
    assert anatomy.blocks == () and anatomy.positions == "pos_embed"
    anatomy.require_plain_embedding()


@pytest.mark.parametrize(
    ("changes", "prefix", "rows", "pooling"),
    [
        ({}, ("cls_token",), 1, "token"),
        ({"reg_tokens": 4}, ("cls_token", "reg_token"), 5, "token"),
        ({"class_token": False, "global_pool": "avg"}, (), 0, "avg"),
        ({"no_embed_class": True}, ("cls_token",), 0, "token"),
    ],
)
def test_prefix_tokens_and_their_position_rows(small_vit, changes, prefix, rows, pooling):
    model = small_vit(**changes)
    anatomy = Anatomy.of(model)
    assert (anatomy.prefix, anatomy.position_prefix, anatomy.pooling) == (prefix, rows, pooling)
    assert anatomy.tokens == 16 + anatomy.prefix_tokens == 16 + model.num_prefix_tokens


def test_every_name_of_a_block_exists_in_its_model(small_vit, moved):
    for model in _families(small_vit, moved):
        anatomy = Anatomy.of(model)
        parameters = {n for n, _ in model.named_parameters()}
        assert anatomy.patch_weight in parameters and anatomy.patch_bias in parameters
        assert anatomy.positions in parameters and set(anatomy.prefix) <= parameters
        for block in anatomy.blocks:
            assert set(block.qkv) | set(block.qkv_bias) <= parameters and block.qkv_bias
            for module in (block.proj, block.fc1, block.fc2, block.norm1, block.norm2):
                assert f"{module}.weight" in parameters and f"{module}.bias" in parameters
        assert len(anatomy.blocks) == 2 and anatomy.classes == 10


def _families(small_vit, moved):
    yield small_vit()
    yield _torchvision()
    transformers = pytest.importorskip("transformers")
    sizes = {
        "image_size": 16, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 192, "num_labels": 10,
    }  # fmt: skip
    for kind in ("ViT", "DeiT", "Dinov2"):
        config = getattr(transformers, f"{kind}Config")(**sizes)
        yield getattr(transformers, f"{kind}ForImageClassification")(config)


def _torchvision():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(16, 4, 2, 4, 96, 192, num_classes=10)


def test_root_mean_square_norms_are_not_taken_for_layer_norms(small_vit):
    from timm.layers import RmsNorm

    assert Anatomy.of(small_vit()).blocks[0].centred
    assert not Anatomy.of(small_vit(norm_layer=RmsNorm)).blocks[0].centred


def test_logits_are_found_in_what_libraries_return():
    logits = torch.zeros(1, 2)
    output = type("Output", (), {"logits": logits})()
    assert all(logits_of(o) is logits for o in (logits, output, (logits, None)))
    with pytest.raises(InputError):
        logits_of({"no": "logits"})


def test_math_attention_has_a_second_derivative(small_vit):
    model, images = small_vit(), torch.zeros(1, 3, 16, 16)

    def twice():
        loss = model(images).square().sum()
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), model.pos_embed)[0]

    with math_attention():
        assert twice().isfinite().all()


def reading(kind, small_vit):
    """A model whose tokens are read behind the blocks: by class attention, or by pooling."""
    import timm

    if kind == "pool":
        return small_vit(global_pool="map", class_token=False)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 4}
    return timm.create_model("cait_xxs24_224", num_classes=10, **sizes)


@pytest.mark.parametrize("kind", ["class attention", "pool"])
def test_attention_behind_the_blocks_is_attention(small_vit, kind):
    model = reading(kind, small_vit)
    anatomy, names = Anatomy.of(model), [n for n, _ in model.named_parameters()]
    behind = [n for n in names if n.startswith(("blocks_token_only.", "attn_pool."))]
    layers = {n: anatomy.role(n) for n in behind if model.get_parameter(n).dim() > 1}
    assert layers and set(layers.values()) == {"attention", "mlp"}
    assert all((role == "mlp") == (".mlp." in n) for n, role in layers.items())
    assert {n for n in behind if "norm" in n} == {n for n in behind if anatomy.role(n) == "norm"}
    assert {*anatomy.select("attention", names)} >= {n for n, r in layers.items() if r != "mlp"}
    seen = {n for reader in anatomy.readers for n in (*reader.qkv, *reader.qkv_bias)}
    assert seen and seen <= set(names)
    assert {f"{r.fc2}.weight" for r in anatomy.readers} <= set(anatomy.select("plan", names))


def test_a_position_embedding_of_another_shape_is_encrypted_with_the_embedding():
    anatomy = Anatomy(
        "hand", "proj", "proj", None, 0, (), None, (), (), (8, 8), (4, 4), 3, 7, 2,
    )  # fmt: skip
    names = ["proj.weight", "pos_embed", "levels.0.pos_embed", "other.weight"]
    assert anatomy.select("embedding", names) == names[:3]


@pytest.mark.parametrize("kind", ["Beit", "Data2VecVision", "Dinov2"])
def test_layer_scale_of_transformers_is_read_whatever_its_name(kind):
    """Without it the equations of an MLP are those of another model."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = getattr(transformers, f"{kind}Config")(image_size=16, patch_size=8, **sizes)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    (block,) = Anatomy.of(model).blocks
    scales = {n for n, _ in model.named_parameters() if "lambda" in n}
    assert len(scales) == 2 and {block.scale1, block.scale2} == scales
