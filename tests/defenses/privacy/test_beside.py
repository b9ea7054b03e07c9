"""Layers beside a private model, with an optimizer of their own: refused before a weight moves."""

import gc

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from vitguard.errors import Unprotected

pytest.importorskip("opacus")
DATA = TensorDataset(
    torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
)


class Around(nn.Module):
    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images):
        return self.head(self.backbone(images))


class Scaled(nn.Module):
    """A criterion that learns."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, labels):
        return F.cross_entropy(self.scale * outputs, labels)


def hidden(model, beside, images):
    """Of features that a hook takes from inside."""
    taken = []
    handle = model.norm.register_forward_hook(lambda module, args, output: taken.append(output))
    outputs = model(images)
    handle.remove()
    return outputs + beside["head"](taken[-1][:, 0])


BESIDE = {
    "a head": lambda m, b, x: b["head"](m(x)),
    "a head around": lambda m, b, x: Around(m, b["head"])(x),
    "a head on hidden features": hidden,
    "a stem": lambda m, b, x: m(b["stem"](x)),
    "a criterion": lambda m, b, x: b["criterion"](m(x), torch.zeros(len(x), dtype=int)),
}


def made(engine="bookkeeping"):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, embed_dim=16, num_heads=2,
        num_classes=16,
    )  # fmt: skip
    guard = vg.protect(model, f"privacy:noise=0.5,clip=1,delta=0.01,engine={engine}")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    beside = nn.ModuleDict(
        {"head": nn.Linear(16, 16), "stem": nn.Conv2d(3, 3, 1), "criterion": Scaled()}
    )
    return model, guard, *guard.prepare(optimizer, DataLoader(DATA, 6)), beside


def step(model, optimizer, loader, beside, way):
    other = torch.optim.SGD(beside.parameters(), lr=0.1)
    for images, labels in loader:
        outputs = way(model, beside, images)
        (outputs if not outputs.dim() else F.cross_entropy(outputs, labels)).backward()
        other.step()
        optimizer.step()
        return


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
@pytest.mark.parametrize("way", BESIDE)
def test_what_is_trained_beside_a_private_model_is_refused(way, engine):
    model, guard, optimizer, loader, beside = made(engine)
    before = [p.detach().clone() for p in (*model.parameters(), *beside.parameters())]
    with pytest.raises(Unprotected, match="all that is trained in the private model"):
        step(model, optimizer, loader, beside, BESIDE[way])
    now = [*model.parameters(), *beside.parameters()]
    assert all(torch.equal(p, b) for p, b in zip(now, before, strict=True))
    assert not guard._ledgers["privacy"].history


@pytest.mark.parametrize("way", ["a head", "a criterion"])
def test_what_is_frozen_beside_it_is_let_through(way):
    gc.collect()  # ends what passes of other tests held that were given up
    held = len(nn.modules.module._global_forward_hooks)
    model, guard, optimizer, loader, beside = made()
    beside.requires_grad_(False)
    for images, labels in loader:
        beside["head"](torch.randn(2, 16))
        outputs = BESIDE[way](model, beside, images)
        (outputs if not outputs.dim() else F.cross_entropy(outputs, labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert guard._ledgers["privacy"].steps == 2
    assert len(nn.modules.module._global_forward_hooks) == held


def test_another_model_in_the_same_loop_is_let_through():
    model, guard, optimizer, loader, beside = made()
    for images, labels in loader:
        outputs = model(images)
        beside["head"](torch.randn(2, 16)).sum().backward()
        F.cross_entropy(outputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        beside["head"](outputs.detach()).sum().backward()
    assert guard._ledgers["privacy"].steps == 2


def test_a_pass_that_was_given_up_leaves_nothing_behind():
    held = set(nn.modules.module._global_forward_hooks)
    model, _, _, loader, _ = made()
    model(next(iter(loader))[0])
    (own,) = nn.modules.module._global_forward_hooks.keys() - held
    del model, loader, _
    gc.collect()
    assert own not in nn.modules.module._global_forward_hooks
