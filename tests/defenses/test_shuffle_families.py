"""The shuffle on models whose patch embedding returns more than the tokens."""

import pytest
import torch

import vitguard as vg
from vitguard.errors import Incompatible

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 32, "patch_size": 8, "num_labels": 10,
}  # fmt: skip
STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_labels": 10}


def swin(**change):
    config = transformers.SwinConfig(**STAGES, num_heads=[2, 2], window_size=4, **change)
    return transformers.SwinForImageClassification(config)


def swin2():
    config = transformers.Swinv2Config(**STAGES, num_heads=[2, 2], window_size=4)
    return transformers.Swinv2ForImageClassification(config)


def data2vec(**change):
    config = transformers.Data2VecVisionConfig(**SMALL, **change)
    return transformers.Data2VecVisionForImageClassification(config)


def beit(**change):
    return transformers.BeitForImageClassification(transformers.BeitConfig(**SMALL, **change))


MODELS = {
    "Swin": swin,
    "Swin with absolute positions": lambda: swin(use_absolute_embeddings=True),
    "Swin v2": swin2,
    "Data2Vec": data2vec,
    "Data2Vec with absolute positions": lambda: data2vec(use_absolute_position_embeddings=True),
    "BEiT": beit,
    "BEiT with absolute positions": lambda: beit(use_absolute_position_embeddings=True),
    "ViT": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)),
    "DeiT": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**SMALL)),
    "Dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**{k: v for k, v in SMALL.items() if k != "intermediate_size"})
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_patches_are_shuffled_whatever_comes_with_the_tokens(kind):
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.train()
    guard = vg.protect(model, "shuffle:ratio=0.5,mask=uniform")
    patches = guard.anatomy.patches
    images = torch.randn(2, 3, 32, 32)
    try:
        MODELS[kind]()(images)
    except RuntimeError as error:
        pytest.skip(f"transformers {transformers.__version__} cannot run it: {error}")
    update = guard.update(images, torch.tensor([1, 2]))
    assert guard.truth()["shuffled"].sum(1).tolist() == [patches // 2] * 2
    assert update.read("vitguard.shuffle.unknown").any()
    seen = []
    stage = model.get_submodule(guard.anatomy.embedded or guard.anatomy.patch_stage)
    handle = stage.register_forward_hook(lambda m, a, out: seen.append(out))
    guard.update(images, torch.tensor([1, 2]))
    model.eval()
    out = model(images).logits
    assert type(seen[0]) is type(seen[1])
    handle.remove()
    guard.remove()
    assert torch.equal(model(images).logits, out)


@pytest.mark.parametrize("kind", ["Swin", "Swin v2"])
def test_localization_over_tokens_is_refused_where_tokens_merge(kind):
    with pytest.raises(Incompatible, match="no blocks in its Anatomy"):
        vg.protect(MODELS[kind](), "shuffle:ratio=0.5,dal=tokens")
