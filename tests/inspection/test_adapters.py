"""Clients that train adapters only: crafted ones are refused, honest ones are not."""

import pytest
import torch
import torch.nn.functional as F

from tests.threats.adapted import adapters, lora, reads_input, reads_output
from vitguard import data
from vitguard.defenses.inspecting import InspectWeights
from vitguard.errors import SuspiciousWeights
from vitguard.guard import protect
from vitguard.inspection import Memory, inspect_weights
from vitguard.inspection.rows import regularity
from vitguard.threats import MaliciousServer
from vitguard.vit import Anatomy

KINDS = {
    "behind": lambda rank=8: adapters(rank, reads_output),
    "beside": lambda rank=8: adapters(rank, reads_input),
    "LoRA fc1": lora,
    "LoRA qkv": lambda rank=8: lora(rank, ("qkv",)),
    "LoRA all": lambda rank=8: lora(rank, ("qkv", "attn.proj", "fc1", "fc2")),
}


def batch(size=4):
    return data.decoys(size, (16, 16), seed=3), torch.arange(size) % 10


def trained(model, optimizer, steps):
    """Return the model after steps of honest training of what asks for a gradient."""
    torch.manual_seed(0)
    images, labels = batch(8)
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    step = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[optimizer](
        parameters, lr={"SGD": 0.05, "AdamW": 1e-3}[optimizer]
    )
    for _ in range(steps):
        step.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        step.step()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 16])
def test_fresh_adapters_whose_last_layer_is_zero_are_not_refused(kind, rank):
    guard = protect(KINDS[kind](rank).train(), [InspectWeights()])
    guard.update(*batch())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_adapters_of_honest_training_are_not_refused(kind, rank, optimizer):
    """Their last layer has few channels, whose gradients are nearly alike in the first steps."""
    guard = protect(trained(KINDS[kind](rank), optimizer, 2), [InspectWeights()])
    guard.update(*batch())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [4, 16])
def test_crafted_adapters_are_refused(kind, rank):
    guard = protect(KINDS[kind](rank).train(), [InspectWeights()])
    crafted = MaliciousServer().hand_out(guard)
    guard.model.load_state_dict({**guard.model.state_dict(), **crafted})
    with pytest.raises(SuspiciousWeights):
        guard.update(*batch())
    assert guard.inspect(crafted, *batch()).score > 4


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_adapters_that_are_crafted_beside_honest_weights_are_refused_by_themselves(rank):
    guard = protect(adapters(rank, reads_input).train(), [InspectWeights()])
    crafted = MaliciousServer("imprint:frozen=false").hand_out(guard)
    found = guard.inspect(crafted, *batch())
    assert "parallel rows" in {s.name for s in found.worst}
    assert "adapter.down" in found.worst[0].where


def test_rows_that_lora_makes_parallel_are_seen_in_its_sum_with_fc1():
    guard = protect(lora(4), ())
    weights = {n: p.detach().clone() for n, p in guard.model.named_parameters()}
    first = "blocks.0.mlp.fc1.lora_"
    weights[f"{first}A.default.weight"][:] = torch.randn(60)
    weights[f"{first}B.default.weight"][:] = 1.0
    named = {n.replace(".base_layer.", "."): t for n, t in weights.items()}
    found = inspect_weights(named, Anatomy.of(guard.model), Memory())
    assert {(s.name, s.where) for s in found.worst} >= {
        ("parallel rows", "blocks.0.mlp.fc1.weight")
    }


def test_biases_of_which_nearly_all_are_alike_follow_no_ruler():
    """As fresh ones after a step of few: the gaps between them were divided by none."""
    values = torch.zeros(100)
    values[-1] = 1.0
    assert regularity(values) == 0.0
