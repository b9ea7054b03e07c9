"""Libraries that register hooks in the first pass (transformers, to record hidden states)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.defenses.privacy.privacy_models import hugging_face
from tests.fast import fast_for

IMAGES, LABELS = torch.rand(8, 3, 32, 32), torch.arange(8)
PRIVATE = "privacy:noise=1,delta=0.01,accountant=rdp"


def trained(model, forward):
    guard = vg.protect(model, PRIVATE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer, loader = guard.prepare(
        optimizer, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    )
    for images, labels in loader:
        F.cross_entropy(forward(model, images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return guard.privacy_spent().steps


@pytest.mark.slow
def test_a_library_that_notes_its_hooks_in_an_attribute_registers_them_once(small_vit):
    model = small_vit(img_size=32, patch_size=8, depth=1)
    seen = []

    def forward(images, plain=model.forward):
        if not getattr(model, "recording", False):
            model.recording = True
            model.blocks[0].register_forward_hook(lambda m, args, output: seen.append(len(output)))
        seen.clear()
        scores = plain(images)
        return scores + 0 * len(seen)

    model.forward = forward
    assert trained(model, lambda m, x: m(x)) == 2
    model.eval()(IMAGES)
    assert seen == [8]


@pytest.mark.slow
@pytest.mark.parametrize("kind", fast_for(["ViT", "Dinov2"], fast=["ViT"]))
def test_hidden_states_of_transformers_are_recorded_once(kind):
    model = hugging_face(kind)
    count = len(copy.deepcopy(model)(IMAGES, output_hidden_states=True).hidden_states)

    def forward(model, images):
        output = model(images, output_hidden_states=True)
        assert len(output.hidden_states) == count
        return output.logits

    assert trained(model, forward) == 2
    assert len(model.eval()(IMAGES, output_hidden_states=True).hidden_states) == count


def test_a_shuffle_takes_a_parametrised_patch_embedding(small_vit):
    model = small_vit(img_size=32, patch_size=8, depth=1)
    nn.utils.parametrizations.spectral_norm(model.patch_embed.proj)
    guard = vg.protect(model, "shuffle:ratio=0.5")
    guard.update(IMAGES, LABELS)
    assert guard.truth()["shuffled"].any()
