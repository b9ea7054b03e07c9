"""Heads that change before or after protect: labels are judged by the head the model has."""

import pytest
import timm
import torch
from torch import nn

import vitguard as vg
from tests.small import vit
from vitguard.errors import InputError
from vitguard.vit import Anatomy


def hugging_face():
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=64, image_size=32, patch_size=8, num_labels=10
    )
    return transformers.ViTForImageClassification(config)


def torchvision():
    import torchvision as tv

    return tv.models.VisionTransformer(32, 8, 1, 2, 64, 64, num_classes=10)


HEADS = {
    "linear": (lambda: nn.Linear(64, 20), 20),
    "sequential": (lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 20)), 20),
    "MLP": (lambda: nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 20)), 20),
    "norm before": (lambda: nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 20)), 20),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(64, 20)), nn.Identity()), 20),
    "identity": (nn.Identity, 0),
}
MODELS = {"timm": (vit, "head"), "transformers": (hugging_face, "classifier")}
MODELS["torchvision"] = (torchvision, "heads")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", MODELS)
def test_the_classes_are_those_of_the_head_the_model_has(family, head, when):
    build, name = MODELS[family]
    make, classes = HEADS[head]
    model = build()
    if when == "before":
        setattr(model, name, make())
        assert Anatomy.of(model).classes == classes
    guard = vg.protect(model, "noise:scale=0.01")
    if when == "after":
        setattr(model, name, make())
    assert guard.anatomy.classes == classes
    images = torch.randn(2, 3, 32, 32)
    guard.update(images, torch.tensor([1, 19]))
    with pytest.raises((InputError, IndexError)):
        guard.update(images, torch.tensor([1, 64]))


@pytest.mark.parametrize("classes", [3, 20])
def test_reset_classifier_after_protect_changes_which_labels_fit(classes):
    model = vit()
    guard = vg.protect(model, "positions:kind=sincos")
    model.reset_classifier(classes)
    guard.update(torch.randn(1, 3, 32, 32), torch.tensor([classes - 1]))
    with pytest.raises(InputError, match=f"labels from 0 to {classes - 1}"):
        guard.update(torch.randn(1, 3, 32, 32), torch.tensor([classes]))


WITHOUT = {
    "num_classes=0": lambda: vit(num_classes=0),
    "reset": lambda: (m := vit(), m.reset_classifier(0))[0],
    "identity": lambda: (m := vit(), setattr(m, "head", nn.Identity()))[0],
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2),
        window_size=4, num_classes=0,
    ),
    "eva": lambda: timm.create_model(
        "eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=0
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WITHOUT)
def test_an_audit_of_a_model_without_a_head_says_so(kind):
    model = WITHOUT[kind]()
    size = Anatomy.of(model).image_size
    with pytest.raises(InputError, match="a model with a classification head"):
        vg.audit(model, (torch.rand(1, 3, *size), torch.tensor([0])), attacks=["position"])
    guard = vg.protect(model, "noise:scale=0.01")  # a loss over features is the caller's own
    update = guard.update(
        torch.rand(2, 3, *size), torch.tensor([1, 2]), loss=lambda out, _: out.square().mean()
    )
    assert update.tensors
