"""What `seal` asks of each tensor: all that defenses of the update would pass over in silence."""

import re

import pytest
import torch

import vitguard as vg
from tests.guard.test_sealing import vit
from vitguard.errors import InputError

CHANGING = ("noise:scale=0.5", "pruning", "low-rank", "sign-update", "quantised-update")
CLIENT = "client-privacy:noise=1,clip=1,delta=0.00001"


def change(model):
    return {n: torch.randn_like(p) for n, p in model.named_parameters()}


def sealed(guard, tensors):
    return guard.seal(vg.Update(tensors, kind="difference", batch_size=2, learning_rate=0.1))


@pytest.mark.parametrize("stack", [*CHANGING, CLIENT])
@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.bool])
def test_parameters_in_whole_numbers_do_not_pass_the_defenses_by(stack, kind):
    guard = vg.protect(vit(), stack)
    tensors = change(guard.model)
    tensors["head.weight"] = (10 * tensors["head.weight"]).to(kind)
    with pytest.raises(InputError, match=f"head.weight as floating-point .* got {kind}"):
        sealed(guard, tensors)


def test_counters_of_a_whole_state_dict_still_pass():
    model = vit()
    model.register_buffer("batches", torch.tensor(3))
    guard = vg.protect(model, "noise:scale=0.5")
    update = sealed(guard, change(model) | {"batches": torch.tensor(3)})
    assert update.tensors["batches"] == 3


@pytest.mark.parametrize("stack", [*CHANGING, CLIENT, "withheld"])
@pytest.mark.parametrize("shape", [(5, 32), (320,), (10, 32, 1)])
def test_a_parameter_of_another_shape_is_refused_before_anything_is_spent(stack, shape):
    guard = vg.protect(vit(), stack)
    tensors = change(guard.model) | {"head.weight": torch.randn(shape)}
    with pytest.raises(InputError, match=re.escape(f"(10, 32), got {shape}")):
        sealed(guard, tensors)
    assert stack != CLIENT or guard.privacy_spent().steps == 0


@pytest.mark.parametrize("stack", [*CHANGING, CLIENT])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_entries_that_are_no_numbers_do_not_leave(stack, value):
    guard = vg.protect(vit(), stack)
    tensors = change(guard.model)
    tensors["pos_embed"][0, 1, 2] = value
    with pytest.raises(InputError, match="finite"):
        sealed(guard, tensors)


@pytest.mark.parametrize("stack", [*CHANGING, CLIENT, "withheld"])
def test_an_update_without_tensors_is_refused(stack):
    guard = vg.protect(vit(), stack)
    with pytest.raises(InputError, match="tensors of the model, got none"):
        sealed(guard, {})
    assert stack != CLIENT or guard.privacy_spent().steps == 0
