"""One order for a manifest: the stack on a copy, the manifest, the encryptor, the stack."""

import copy
import re

import pytest
import timm
import torch

import vitguard as vg
from vitguard.defenses.encryption import Encryptor, KeySet, Manifest
from vitguard.errors import InputError
from vitguard.registry import parse_stack

KEYS = KeySet.generate()


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10, embed_dim=64,
        num_heads=2,
    )  # fmt: skip


STACKS = [
    ("", "all"),
    ("positions:kind=sincos", "all"),
    ("positions:kind=sincos+shuffle:ratio=0.5", "all"),
    ("withheld+shuffle:ratio=0.5,dal=tokens", "all"),
    ("shuffle:ratio=0.5,dal=positions,warmup=1,steps=4", "all"),
    ("positions:kind=frozen", "plan"),
    ("positions:kind=frozen+shuffle:ratio=0.5", "plan"),
    ("shuffle:ratio=0.5", "embedding/plan"),
]


@pytest.mark.parametrize(("stack", "select"), STACKS)
def test_the_manifest_of_a_guard_is_that_of_every_update_of_its_stack(stack, select):
    model, defenses = vit(), parse_stack(stack) if stack else []
    planned = vg.protect(copy.deepcopy(model), [*defenses, vg.EncryptedGradients(select)])
    manifest = Manifest.of(planned.encrypted(), bounds=50.0)
    encryptor = Encryptor(KEYS, manifest, client_id="a", outliers="clip")
    guard = vg.protect(model, [*defenses, vg.EncryptedGradients(select, encryptor=encryptor)])
    encryptor.start_round(1)
    update = guard.update(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert "encryption" in update.payloads and not set(manifest.names) & set(update.tensors)


@pytest.mark.parametrize(
    ("stack", "made_of", "named"),
    [
        ("positions:kind=sincos", lambda m: m, "with pos_embed"),
        ("withheld", lambda m: m, "with pos_embed"),
        ("shuffle:ratio=0.5", lambda m: m, "without vitguard.shuffle.unknown"),
        (
            "positions:kind=sincos+shuffle:ratio=0.5",
            lambda m: m,
            "without vitguard.shuffle.unknown, with pos_embed",
        ),
        ("", lambda m: {k: m[k] for k in m if "head" not in k}, "without head.bias, head.weight"),
        ("", lambda m: m | {"stranger": torch.ones(1)}, "with stranger"),
        (
            "",
            lambda m: {"pos_embed": m["pos_embed"]},
            "blocks.0.attn.proj.weight, blocks.0.attn.qkv.bias ...",
        ),
    ],
)
def test_a_manifest_of_other_tensors_names_them_and_the_order_to_make_it(stack, made_of, named):
    model = vit()
    manifest = Manifest.of(made_of(dict(model.named_parameters())), bounds=50.0)
    encryptor = Encryptor(KEYS, manifest, client_id="a")
    encryptor.start_round(1)
    defenses = [*(parse_stack(stack) if stack else []), vg.EncryptedGradients(encryptor=encryptor)]
    guard = vg.protect(model, defenses)
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        guard.update(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert "Manifest.of(guard.encrypted(), bounds=...)" in str(caught.value)


def test_a_difference_of_a_whole_state_dict_is_encrypted_under_a_manifest_of_it():
    model = vit()
    model.blocks.requires_grad_(False)
    manifest = Manifest.of(model.state_dict(), bounds=50.0)
    encryptor = Encryptor(KEYS, manifest, client_id="a")
    encryptor.start_round(1)
    guard = vg.protect(model, [vg.EncryptedGradients(encryptor=encryptor)])
    zero = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    sealed = guard.seal(vg.Update(zero, kind="difference", batch_size=1))
    assert not sealed.tensors and "encryption" in sealed.payloads


def normed():
    model = vit()
    model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 10))
    return model


def test_the_manifest_of_a_guard_has_the_buffers_that_a_client_sends():
    """An update of a step is of parameters alone: it says that buffers did not change."""
    manifest = Manifest.of(vg.protect(normed(), "encryption").encrypted(), bounds=50.0)
    assert {"head.0.running_mean", "head.0.running_var"} <= {*manifest.names}
    assert "head.0.num_batches_tracked" not in manifest.names
    encryptor = Encryptor(KEYS, manifest, client_id="a")
    encryptor.start_round(1)
    guard = vg.protect(normed(), [vg.EncryptedGradients(encryptor=encryptor)])
    update = guard.update(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert not update.tensors and "encryption" in update.payloads
    state = {n: torch.zeros_like(t) for n, t in guard.model.state_dict().items() if n[:2] != "vi"}
    sealed = guard.seal(vg.Update(state, kind="difference", batch_size=2))
    assert not sealed.tensors and "encryption" in sealed.payloads
    state.pop("head.0.running_mean")
    with pytest.raises(InputError, match=r"head\.0\.running_mean"):
        guard.seal(vg.Update(state, kind="difference", batch_size=2))


def test_the_manifest_of_a_guard_names_tied_parameters_by_each_name():
    def tied():
        model = vit()
        model.blocks.append(model.blocks[0])
        return model

    manifest = Manifest.of(vg.protect(tied(), "encryption").encrypted(), bounds=50.0)
    assert {"blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"} <= {*manifest.names}
    encryptor = Encryptor(KEYS, manifest, client_id="a")
    encryptor.start_round(1)
    guard = vg.protect(tied(), [vg.EncryptedGradients(encryptor=encryptor)])
    seen = {}
    encryptor.seal, seal = lambda u, **k: (seen.update(u.tensors), seal(u, **k))[1], encryptor.seal
    update = guard.update(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert not update.tensors
    assert torch.equal(seen["blocks.0.mlp.fc1.weight"], seen["blocks.1.mlp.fc1.weight"])
