"""A model that is moved without its values: what a defense holds is restored, or it says so."""

import copy
import pickle
import warnings

import pytest
import torch

import vitguard as vg
from tests.small import vit
from vitguard.defenses.positions import sincos_positions
from vitguard.errors import Incompatible, Unprotected

STACKS = {
    "positions:kind=sincos": "restored",
    "positions:kind=none": "restored",
    "positions:kind=frozen": "restored",  # by the load, whose positions are the frozen ones
    "positions:kind=random": "refused",
    "withheld": "refused",
    "shuffle:ratio=0.5": "refused",
    "shuffle:ratio=0.5,dal=tokens": "refused",
    "shuffle:ratio=0.5,warmup=2,steps=4,schedule=linear": "refused",
    "positions:kind=sincos+shuffle:ratio=0.5": "refused",
}


def emptied(model, monkeypatch):
    """Call to_empty where new memory is never what it was by chance."""
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: empty(t, **k).fill_(7))
    model.to_empty(device="cpu")
    monkeypatch.undo()
    return model


@pytest.mark.parametrize("stack", STACKS)
def test_a_model_on_the_meta_device_is_refused_before_anything_is_installed(stack):
    model = vit().to("meta")  # timm's older releases cannot be built there
    before = set(model.state_dict())
    with pytest.raises(Incompatible, match=r"meta device.*then protect"):
        vg.protect(model, stack)
    assert set(model.state_dict()) == before and not hasattr(model, "vitguard")


def test_noise_needs_no_values_and_is_installed_on_the_meta_device():
    model = vit().to("meta")
    vg.protect(model, "noise:scale=0.01").verify()


@pytest.mark.parametrize("way", ["to_empty", "through meta"])
@pytest.mark.parametrize(("stack", "outcome"), STACKS.items())
def test_values_lost_after_protect_are_restored_by_a_load_or_refused(
    stack, outcome, way, monkeypatch
):
    model, original = vit(), vit().state_dict()
    guard = vg.protect(model, stack)
    if way == "through meta":
        model.to("meta")
    emptied(model, monkeypatch)
    model.load_state_dict(original)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    if outcome == "refused":
        with pytest.raises(Unprotected, match="moved without them"):
            guard.verify()
        with pytest.raises(Unprotected, match="moved without them"):
            guard.update(images, labels)
        return
    guard.verify()
    guard.update(images, labels)
    want = {
        "positions:kind=sincos": sincos_positions((4, 4), 64).float(),
        "positions:kind=none": torch.zeros(16, 64),
        "positions:kind=frozen": original["pos_embed"][0, 1:],
    }[stack]
    assert torch.equal(model.pos_embed[0, 1:], want)
    assert torch.equal(guard.public_model().pos_embed[0, 1:], want)


@pytest.mark.parametrize("stack", ["shuffle:ratio=0.5", "shuffle:ratio=0.5,dal=tokens"])
def test_a_state_dict_of_the_protected_model_brings_the_values_back(stack, monkeypatch):
    model = vit()
    guard = vg.protect(model, stack)
    saved = copy.deepcopy(model.state_dict())
    emptied(model, monkeypatch).load_state_dict(saved)
    guard.verify()
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


def test_frozen_positions_stay_lost_until_a_load_brings_them(monkeypatch):
    model = vit()
    guard = vg.protect(model, "positions:kind=frozen")
    state = {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
    emptied(model, monkeypatch).load_state_dict(state, strict=False)
    with pytest.raises(Unprotected, match="moved without them"):
        guard.verify()
    with pytest.raises(Unprotected, match="moved without them"):
        model(torch.randn(1, 3, 32, 32))


def test_sine_cosine_positions_without_a_load_are_not_taken_for_right(monkeypatch):
    model = vit()
    guard = vg.protect(model, "positions:kind=sincos")
    emptied(model, monkeypatch)
    with pytest.raises(Unprotected, match="sincos positions"):
        guard.verify()


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half().float(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.share_memory(),
        lambda m: m.to("cpu", non_blocking=True),
    ],
    ids=["half and back", "bfloat16", "double", "copy", "pickle", "shared memory", "cpu"],
)
def test_moves_that_keep_the_values_are_not_refused(stack, move):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = vit()
        vg.protect(model, stack)
        vg.Guard.of(move(model)).verify()


def test_a_servers_average_of_fixed_positions_is_not_taken_for_a_fault():
    model = vit()
    guard = vg.protect(model, "positions:kind=sincos")
    with torch.no_grad():
        model.pos_embed.copy_(sum(model.pos_embed / 3 for _ in range(3)))
    guard.verify()
    with torch.no_grad():
        model.pos_embed.mul_(2)
    with pytest.raises(Unprotected, match="other values"):
        guard.verify()


RESIZED = [(64, 64), (32, 64), (16, 16), (40, 40), (64, 32)]


@pytest.mark.parametrize("size", RESIZED)
@pytest.mark.parametrize("stack", ["withheld", "positions:kind=sincos", "positions:kind=frozen"])
def test_positions_of_another_size_after_protect_are_refused_in_words(stack, size):
    model = vit()
    guard = vg.protect(model, stack)
    model.set_input_size(img_size=size)
    with pytest.raises(Unprotected, match="Resize the model first, then protect it"):
        guard.update(torch.randn(2, 3, *size), torch.tensor([1, 2]))
    if stack == "withheld":
        with pytest.raises(Unprotected, match="Resize the model first, then protect it"):
            guard.public_model()
