"""DAL over tokens: the head sees the output tokens of the patches, whatever stands before them."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vitguard as vg
from tests.conftest import known
from vitguard.errors import Incompatible, VitguardError

STACK = "shuffle:ratio=0.5,mask=uniform,dal=tokens,dal_weight=1"
SMALL = {"embed_dim": 48, "num_heads": 2}


def build(name, **settings):
    def make(**change):
        torch.manual_seed(0)
        sizes = {"img_size": 64, "depth": 2, "num_classes": 5} | settings
        return with_prefix(timm.create_model(known(name), **(sizes | change)))

    return make


def with_prefix(model):
    """Return a model; skip where this timm drops the class token of one without positions."""
    if getattr(model, "pos_embed", 0) is None and getattr(model, "cls_token", None) is not None:
        images = torch.zeros(1, 3, *model.patch_embed.img_size)
        with torch.no_grad():
            tokens = model.eval().forward_features(images)
        model.train()
        if tokens.shape[1] == model.patch_embed.num_patches:
            pytest.skip(f"timm {timm.__version__} drops the class token without positions")
    return model


def hugging_face(kind, **settings):
    def make():
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=64,
            patch_size=16, num_labels=5, **settings,
        )  # fmt: skip
        return getattr(transformers, f"{kind}ForImageClassification")(config)

    return make


def torchvision():
    torch.manual_seed(0)
    return pytest.importorskip("torchvision").models.VisionTransformer(
        64, 16, 2, 2, 48, 96, num_classes=5
    )


# how to build it, and the tokens that stand before the patches, counted by hand
MODELS = {
    "no positions": (build("vit_tiny_patch16_224", pos_embed="none"), 1),
    "no positions, no class token": (
        build("vit_tiny_patch16_224", pos_embed="none", class_token=False, global_pool="avg"), 0,
    ),
    "no positions, registers": (build("vit_tiny_patch16_224", pos_embed="none", reg_tokens=4), 5),
    "DINOv3": (build("vit_small_patch16_dinov3"), 5),
    "DINOv3 with gated MLPs": (build("vit_small_plus_patch16_dinov3"), 5),
    "BEiT": (build("beit_base_patch16_224", **SMALL), 1),
    "BEiT v2": (build("beitv2_base_patch16_224", **SMALL), 1),
    "relative positions": (build("vit_relpos_small_patch16_224"), 0),
    "relative positions, class token": (build("vit_relpos_base_patch16_clsgap_224", **SMALL), 1),
    "rotary": (build("vit_small_patch16_rope_mixed_224"), 1),
    "rotary and absolute": (build("vit_small_patch16_rope_ape_224"), 1),
    "rotary, one register": (build("vit_medium_patch16_rope_reg1_gap_256"), 1),
    "DINOv2 with registers": (build("vit_small_patch14_reg4_dinov2", img_size=56), 5),
    "registers without position rows": (
        build("vit_tiny_patch16_224", reg_tokens=4, no_embed_class=True), 5,
    ),
    "registers and mean pooling": (build("vit_medium_patch16_reg4_gap_256"), 4),
    "distilled": (build("deit_tiny_distilled_patch16_224"), 2),
    "EVA-02": (build("eva02_tiny_patch14_224", img_size=56), 1),
    "Perception Encoder": (build("vit_pe_core_tiny_patch16_384"), 1),
    "SigLIP": (build("vit_base_patch16_siglip_224", **SMALL), 0),
    "CaiT": (build("cait_xxs24_224"), 0),
    "SAM": (build("samvit_base_patch16_224", **SMALL), 0),
    "torchvision": (torchvision, 1),
    "transformers' ViT": (hugging_face("ViT", intermediate_size=96), 1),
    "transformers' DeiT": (hugging_face("DeiT", intermediate_size=96), 2),
    "transformers' BEiT": (hugging_face("Beit", intermediate_size=96), 1),
    "transformers' Data2Vec": (hugging_face("Data2VecVision", intermediate_size=96), 1),
    "transformers' DINOv2": (hugging_face("Dinov2"), 1),
    "transformers' DINOv2 with registers": (hugging_face("Dinov2WithRegisters"), 5),
}  # fmt: skip


def first(value):
    return value[0] if isinstance(value, tuple) else value


def rows(tokens):
    """Return (batch, tokens, width): SAM keeps rows and columns of tokens."""
    return tokens.flatten(1, 2) if tokens.dim() == 4 else tokens


@pytest.mark.parametrize("kind", MODELS)
def test_localization_over_tokens_reads_the_patches_and_nothing_else(kind):
    make, before = MODELS[kind]
    model = make().train()
    guard = vg.protect(model, STACK)
    anatomy, piece = guard.anatomy, model.get_submodule("vitguard.shuffle")
    seen = {}
    last = model.get_submodule(anatomy.blocks[-1].name)
    last.register_forward_hook(lambda m, args, out: seen.update(out=rows(first(out))))
    model(torch.randn(2, 3, *anatomy.image_size))
    each = piece.per_example_auxiliary()

    assert seen["out"].shape[1] == before + anatomy.patches == before + 16
    shuffled, head = guard.truth()["shuffled"], piece.head.layers[0]
    for i in range(2):
        errors = []
        for patch in range(16):
            if not shuffled[i, patch]:
                vector = F.layer_norm(seen["out"][i, before + patch], (anatomy.width,))
                row, column = head.weight @ vector + head.bias
                errors.append(abs(row - patch // 4 / 3) + abs(column - patch % 4 / 3))
        assert torch.allclose(each[i], sum(errors) / len(errors), atol=1e-6)
    each.sum().backward()
    assert head.weight.grad.any() and model.get_parameter(anatomy.patch_weight).grad.any()


@pytest.mark.parametrize("kind", MODELS)
def test_so_many_tokens_stand_before_the_patches(kind):
    make, before = MODELS[kind]
    model = make().eval()
    anatomy = vg.Anatomy.of(model)
    seen = []
    model.get_submodule(anatomy.blocks[0].name).register_forward_pre_hook(
        lambda m, args: seen.append(rows(first(args)))
    )
    images = torch.randn(1, 3, *anatomy.image_size)
    model(images)
    high, wide = anatomy.patch_size
    for patch in (0, 6, 15):
        changed = images.clone()
        top, left = patch // 4 * high, patch % 4 * wide
        changed[..., top : top + high, left : left + wide] += 1
        model(changed)
        moved = (seen[-1] - seen[0]).abs().amax((0, 2)) > 1e-6
        assert moved.nonzero().flatten().tolist() == [before + patch]


REFUSED = {
    "Swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2),
        window_size=4, num_classes=5,
    ),
    "patch dropout": build("vit_tiny_patch16_224", patch_drop_rate=0.5),
    "parallel blocks": build("vit_small_patch16_18x2_224"),
    "FlexiViT with dropped patches": build("flexivit_small", patch_drop_rate=0.25),
    "DINOv3 with dropped patches": build("vit_small_patch16_dinov3", patch_drop_rate=0.25),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_localization_over_tokens_is_refused_at_protect_where_patches_are_lost(kind):
    model = REFUSED[kind]()
    with pytest.raises(Incompatible, match="Leave DAL out"):
        vg.protect(model, STACK)
    vg.protect(model, "shuffle:ratio=0.5")


def drop_last(module, args, out):
    return out[:, :-1]


def merge_pairs(module, args, out):
    return out[:, ::2]


CHANGED = {
    "the last token is dropped": drop_last,
    "tokens are merged in pairs": merge_pairs,
    "a token is added": lambda m, args, out: torch.cat([out, out[:, :1]], 1),
    "two tokens are added in front": lambda m, args, out: torch.cat([out[:, :2], out], 1),
    "the pooled token alone is left": lambda m, args, out: out[:, :1],
}


@pytest.mark.parametrize("positions", ["learn", "none"])
@pytest.mark.parametrize("change", CHANGED)
def test_tokens_that_change_their_number_are_refused_before_the_first_step(change, positions):
    model = build("vit_tiny_patch16_224", pos_embed=positions)()
    model.blocks[-1].register_forward_hook(CHANGED[change])
    guard = vg.protect(model, STACK)
    with pytest.raises(Incompatible, match=r"1 prefix tokens and 16 patches.*Leave DAL out"):
        model(torch.randn(2, 3, 64, 64))
        guard.auxiliary_loss()


@pytest.mark.parametrize("size", [32, 48, 80, 96])
def test_images_of_another_size_are_localized_on_their_own_grid(size):
    model = build("vit_tiny_patch16_224", dynamic_img_size=True)()
    guard = vg.protect(model, STACK)
    model(torch.randn(2, 3, size, size))
    assert guard.auxiliary_loss() > 0
    assert guard.truth()["shuffled"].shape == (2, (size // 16) ** 2)
    vg.Guard.of(model).remove()
    guard = vg.protect(model, STACK.replace("tokens", "positions"))
    with pytest.raises(VitguardError, match=r"got \d+: the images have another size.*dal='tokens'"):
        model(torch.randn(2, 3, size, size))
        guard.auxiliary_loss()
