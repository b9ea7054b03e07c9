"""One table: position and span by capability, on every kind of model that we say we know.

Weights are random and moved, sizes are small. Where a row names a reason, the attack must say that
it does not apply and why.
"""

import pytest
import torch

from vitguard.attacks.position import PositionInversion
from vitguard.attacks.span import SpanInversion
from vitguard.errors import NotApplicable
from vitguard.metrics import psnr
from vitguard.vit import Anatomy

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 4}
VIT = "vit_tiny_patch16_224"


def timm_model(name, sizes=SIZES, **arguments):
    import timm

    return timm.create_model(name, num_classes=10, **{**sizes, **arguments})


def rms_norm():
    from timm.layers import RmsNorm

    return timm_model(VIT, norm_layer=RmsNorm)


def block(name):
    from timm.models import vision_transformer

    return timm_model(VIT, block_fn=getattr(vision_transformer, name))


def transformers_model(kind, **arguments):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        image_size=32, patch_size=8, hidden_size=192, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=384, num_labels=10, **arguments,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def torchvision_model():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 192, 384, num_classes=10)


LEAKS = ("leaks", "leaks")
FULL_SIZE = {"depth": 2}
NO_POSITIONS = ("no absolute position", "without absolute positions")

TABLE = {
    # The control for a failing condition: 196 patches and 197 tokens of width 384 leave 187
    # equations for 197 unknowns: D - T >= r + 1 fails, span is not unique. Position needs N < D.
    "vit_small_patch16_224": (
        lambda: timm_model("vit_small_patch16_224", FULL_SIZE), ("leaks", "not unique")),
    "deit_base": (lambda: timm_model("deit_base_patch16_224"), LEAKS),
    "deit_base_distilled": (lambda: timm_model("deit_base_distilled_patch16_224"), LEAKS),
    "registers": (lambda: timm_model("vit_base_patch14_reg4_dinov2"), LEAKS),
    "average pooling": (lambda: timm_model(VIT, class_token=False, global_pool="avg"), LEAKS),
    "no_embed_class": (lambda: timm_model(VIT, no_embed_class=True), LEAKS),
    "LayerScale": (lambda: timm_model(VIT, init_values=0.1), LEAKS),
    "qk-norm": (lambda: timm_model(VIT, qk_norm=True), LEAKS),
    "no qkv bias": (lambda: timm_model(VIT, qkv_bias=False), LEAKS),
    "RMSNorm": (rms_norm, LEAKS),
    "SigLIP": (lambda: timm_model("vit_base_patch16_siglip_224"), LEAKS),
    "dynamic_img_size": (lambda: timm_model(VIT, dynamic_img_size=True), LEAKS),
    "EVA": (lambda: timm_model("eva_giant_patch14_224"), LEAKS),
    "EVA-02": (lambda: timm_model("eva02_tiny_patch14_224"), LEAKS),
    "CaiT": (lambda: timm_model("cait_xxs24_224"), LEAKS),
    "transformers ViT": (lambda: transformers_model("ViT"), LEAKS),
    "transformers DeiT": (lambda: transformers_model("DeiT"), LEAKS),
    "transformers Dinov2": (lambda: transformers_model("Dinov2"), LEAKS),
    "transformers Dinov2 registers": (lambda: transformers_model("Dinov2WithRegisters"), LEAKS),
    "torchvision": (torchvision_model, LEAKS),
    "parallel blocks": (
        lambda: block("ParallelThingsBlock"), ("leaks", r"not x \+ attention\(norm\(x\)\)")),
    "post-norm": (lambda: block("ResPostBlock"), ("leaks", r"not x \+ attention\(norm\(x\)\)")),
    "CLIP": (
        lambda: timm_model("vit_base_patch16_clip_224"),
        ("norm between the embedding", "norm between the embedding")),
    "BEiT": (lambda: timm_model("beit_base_patch16_224"), NO_POSITIONS),
    "relative positions": (lambda: timm_model("vit_relpos_small_patch16_224"), NO_POSITIONS),
    "Swin": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "window_size": 4, "depths": (1, 1, 1, 1)}),
        ("norm inside the patch embedding", "norm inside the patch embedding")),
    "transformers Swin": (
        lambda: transformers_swin(),
        ("norm inside the patch embedding", "norm inside the patch embedding")),
    "transformers BEiT": (
        lambda: transformers_model("Beit", use_absolute_position_embeddings=True), LEAKS),
}  # fmt: skip


def transformers_swin():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[1, 2], window_size=4
    )
    return transformers.SwinForImageClassification(config)


@pytest.mark.parametrize("row", TABLE)
def test_position_and_span_by_capability(row, moved, observe, generator):
    build, outcomes = TABLE[row]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = moved(build())
    anatomy = Anatomy.of(model)
    pixels = torch.rand(1, 3, *anatomy.image_size, generator=generator)
    fixed = "positions:kind=frozen" if anatomy.positions else "none"
    views = observe(model, pixels), observe(model, pixels, defenses=fixed)
    for attack, view, outcome in zip(
        (PositionInversion(), SpanInversion()), views, outcomes, strict=True
    ):
        if outcome not in ("leaks", "not unique"):
            with pytest.raises(NotApplicable, match=outcome):
                attack.run(view, generator)
            continue
        guess = attack.run(view, generator)
        quality = float(psnr(guess.images, pixels))
        if outcome == "leaks":
            assert quality > 90, (attack.name, quality)
        else:
            assert quality < 40 and guess.details["nullity"] > 0, (attack.name, quality)


@pytest.mark.parametrize("sent", ["q", "k", "v"])
def test_query_or_value_alone_is_enough_where_they_are_layers(sent, moved, observe, generator):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = moved(transformers_model("ViT"))
    pixels = torch.rand(1, 3, 32, 32, generator=generator)
    named = {"q": "q|query", "k": "k|key", "v": "v|value"}  # as versions of transformers call them
    others = "|".join(names for one, names in named.items() if one != sent)
    withheld = (rf"\.({others})(_proj)?\.", "mlp", r"\.o(_proj|utput)")
    view = observe(model, pixels, defenses="positions:kind=frozen", withhold=withheld)
    if sent == "k":  # softmax does not feel a shift of all keys: one direction is missing
        with pytest.raises(NotApplicable, match="rank 16"):
            SpanInversion().run(view, generator)
        return
    guess = SpanInversion().run(view, generator)
    assert guess.details["from"] == "qkv"
    assert float(psnr(guess.images, pixels)) > 80


def test_positions_that_are_resampled_in_the_forward_pass_do_not_apply(
    small_vit, observe, photo, generator
):
    model = small_vit()
    # what a model run at another size than its position table was made for looks like
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + 4, 96))
    model._pos_embed = lambda x: model.norm_pre(
        torch.cat([model.cls_token, x + model.pos_embed[:, 1:].repeat_interleave(4, 1)], 1)
    )
    for attack in (PositionInversion(), SpanInversion()):
        with pytest.raises(NotApplicable, match="resampled"):
            attack.run(observe(model, photo), generator)
