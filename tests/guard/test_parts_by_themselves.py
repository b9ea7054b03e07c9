"""Training of a part of a shuffled model by itself: on shuffled features, or it is not sealed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitguard as vg
from tests.conftest import small_vit
from vitguard.errors import Unprotected

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)
VIEWS = (slice(0, 2), slice(2, 4))


def protected(dal="none"):
    model = small_vit(depth=2)
    return model, vg.protect(model, f"shuffle:ratio=0.5,mask=uniform,dal={dal}")


@torch.no_grad()
def cached(model):
    """Tokens behind the first block and features, of images as they are."""
    model.eval()
    tokens = model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(IMAGES))))
    found = tokens, model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    model.train()
    return found


def replayed(model, features):
    """Features of images as they are beside those of the shuffled batch."""
    fresh = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    return model.head(torch.cat([fresh[:2], features[2:]]))


def new_head(model):
    model.head = nn.Linear(model.head.in_features, 10)


PARTS = {
    "the head": lambda m, tokens, features: m.head(features),
    "a new head": lambda m, tokens, features: (new_head(m), m.head(features))[1],
    "norm and head": lambda m, tokens, features: m.forward_head(m.norm(tokens)),
    "the last block": lambda m, tokens, features: m.forward_head(m.norm(m.blocks[1](tokens))),
    "a copy": lambda m, tokens, features: m.head(features),
    "a replay beside fresh ones": lambda m, tokens, features: replayed(m, features),
    "a replay, stacked": lambda m, tokens, features: m.head(
        torch.stack([m.forward_head(m.forward_features(IMAGES), pre_logits=True), features])
    ).mean(0),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a step"])
def test_a_part_trained_on_images_as_they_are_moves_nothing_and_is_not_sealed(part, before):
    model, guard = protected()
    if part == "a copy":
        model = copy.deepcopy(model)
        guard = vg.Guard.of(model)
    found = cached(model)
    if before:
        F.cross_entropy(model(IMAGES), LABELS).backward()
        guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1)).step()
        model.zero_grad()
    F.cross_entropy(PARTS[part](model, *found), LABELS).backward()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    start = model.head.weight.detach().clone()
    with pytest.raises(Unprotected, match="features that were not"):
        optimizer.step()
    assert torch.equal(model.head.weight, start)
    update = vg.Update({"head.weight": torch.ones_like(start)}, kind="difference", batch_size=4)
    with pytest.raises(Unprotected, match="features that were not shuffled"):
        guard.seal(update)


def intermediate(model):
    return model.forward_head(model.forward_intermediates(IMAGES, indices=1)[0])


def checkpointed(model):
    model.set_grad_checkpointing()
    return model(IMAGES)


def broken_off(model):
    with pytest.raises(RuntimeError):
        model(IMAGES[:, :2])
    return model(IMAGES)


def frozen(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("head", "vitguard")))
    return model(IMAGES)


SHUFFLED = {
    "in two parts": lambda m: m.forward_head(m.forward_features(IMAGES)),
    "intermediate features": intermediate,
    "checkpoints": checkpointed,
    "after a pass that broke off": broken_off,
    "a new head": lambda m: (new_head(m), m(IMAGES))[1],
    "a frozen trunk": frozen,
    "two views in one batch": lambda m: m.head(
        torch.cat([m.forward_head(m.forward_features(IMAGES[i]), pre_logits=True) for i in VIEWS])
    ),
    "two passes of the head": lambda m: m.head(
        m.forward_head(m.forward_features(IMAGES), pre_logits=True) * 2
    ),
}


@pytest.mark.parametrize("way", SHUFFLED)
def test_a_part_that_goes_on_from_shuffled_tokens_is_trained_and_sealed(way):
    model, guard = protected()
    model.train()
    F.cross_entropy(SHUFFLED[way](model), LABELS).backward()
    start = model.head.weight.detach().clone()
    guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1)).step()
    moved = {"head.weight": model.head.weight.detach() - start}
    assert moved["head.weight"].any()
    guard.seal(vg.Update(moved, kind="difference", batch_size=4))


def test_no_hook_is_left_after_remove():
    model, guard = protected("tokens")
    model.train()(IMAGES)
    guard.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
