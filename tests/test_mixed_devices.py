"""Images, labels and updates of another device or type than the model's."""

import pytest
import timm
import torch

import vitguard as vg
from vitguard.errors import InputError

STACKS = [
    "noise:scale=0.1", "pruning:keep=0.5", "client-privacy:noise=1,delta=1e-5", "encryption",
    "positions:kind=sincos", "shuffle:ratio=0.5", "privacy:noise=1,delta=1e-5",
]  # fmt: skip


def vit(**change):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "num_classes": 10, "embed_dim": 32}
    return timm.create_model("vit_tiny_patch16_224", num_heads=2, **(sizes | change))


def guarded(stack):
    return vg.protect(vit(), stack, generator=torch.Generator().manual_seed(0))


BATCHES = {
    "images on meta": (lambda x: x.to("meta"), lambda y: y, "with values"),
    "labels on meta": (lambda x: x, lambda y: y.to("meta"), "with values"),
    "images in float64": (lambda x: x.double(), lambda y: y, "images in torch.float32 on cpu"),
    "images in float16": (lambda x: x.half(), lambda y: y, "images in torch.float32 on cpu"),
    "images in bfloat16": (lambda x: x.bfloat16(), lambda y: y, "images in torch.float32 on cpu"),
    "images in bytes": (lambda x: x.byte(), lambda y: y, "floating-point images"),
    "sparse images": (lambda x: x.to_sparse(), lambda y: y, None),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("stack", STACKS)
def test_a_batch_of_another_kind_than_the_model_says_what_the_model_takes(stack, batch):
    images, labels, said = BATCHES[batch]
    guard = guarded(stack)
    given = images(torch.randn(2, 3, 32, 32)), labels(torch.tensor([1, 2]))
    if said is None:
        with pytest.raises((InputError, RuntimeError)):
            guard.update(*given)
        return
    with pytest.raises(InputError, match=said):
        guard.update(*given)
    if "privacy" in stack:
        assert guard.privacy_spent().steps == 0


def test_a_model_in_another_type_takes_images_of_that_type():
    for kind in (torch.float64, torch.bfloat16):
        guard = vg.protect(vit().to(kind), "noise:scale=0.1")
        guard.update(torch.randn(2, 3, 32, 32).to(kind), torch.tensor([1, 2]))
        with pytest.raises(InputError, match=f"images in {kind}"):
            guard.update(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))


def test_autocast_takes_images_of_any_type_as_torch_does():
    guard = guarded("noise:scale=0.1")
    with torch.autocast("cpu", torch.bfloat16):
        guard.update(torch.randn(2, 3, 32, 32).bfloat16(), torch.tensor([1, 2]))


TENSORS = {
    "on meta": (lambda t: t.to("meta"), "on meta in the update. Load its values"),
    "sparse": (lambda t: t.to_sparse(), "sparse_coo"),
    "compressed": (lambda t: t.to_sparse_csr(), "sparse_csr"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "qint8"),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("stack", [s for s in STACKS if not s.startswith("privacy")])
def test_a_tensor_that_no_defense_can_act_on_is_refused_before_anything_is_spent(stack, kind):
    change, said = TENSORS[kind]
    guard = guarded(stack)
    tensors = {n: 0.01 * torch.randn_like(p) for n, p in guard.model.named_parameters()}
    tensors["head.weight"] = change(tensors["head.weight"])
    with pytest.raises(InputError, match=f"head.weight as a dense tensor.*{said}"):
        guard.seal(vg.Update(tensors, kind="difference", batch_size=2))
    if "privacy" in stack:
        assert guard.privacy_spent().steps == 0


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stack", [s for s in STACKS if not s.startswith("privacy")])
def test_tensors_of_several_types_are_sealed_each_in_its_own(stack, kind):
    guard = guarded(stack)
    tensors = {n: 0.01 * torch.randn_like(p) for n, p in guard.model.named_parameters()}
    tensors["head.weight"] = tensors["head.weight"].to(kind)
    sealed = guard.seal(vg.Update(tensors, kind="difference", batch_size=2))
    assert stack == "encryption" or sealed.read("head.weight").dtype == kind
