"""Any optimizer but the private one is refused at its first step, and so is its state."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from vitguard.errors import Incompatible, InputError, Unprotected

pytest.importorskip("opacus")
STACK = "privacy:noise=1,clip=1,delta=0.01,accountant=rdp"
DATA = TensorDataset(
    torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8)
)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def prepared(model, batch=8):
    guard = vg.protect(model, STACK)
    return guard, *guard.prepare(sgd(model), DataLoader(DATA, batch))


@pytest.mark.parametrize("batch", [8, 4])
def test_a_stock_optimizer_on_the_private_loader_raises_at_its_first_step(small_vit, batch):
    model = small_vit(depth=1)
    _, _, loader = prepared(model, batch)
    stock = sgd(model)
    images, labels = next(iter(loader))
    F.cross_entropy(model(images), labels).backward()
    with pytest.raises(Unprotected, match=r"optimizer that guard\.prepare returned"):
        stock.step()


def test_the_optimizer_of_another_model_steps_meanwhile(small_vit):
    model, other = small_vit(depth=1), small_vit(depth=1)
    _, optimizer, loader = prepared(model)
    for images, labels in loader:
        F.cross_entropy(other(images), labels).backward()
        sgd(other).step()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def trained(model, guard, optimizer, loader, steps):
    batches = iter(loader)
    for _ in range(steps):
        images, labels = next(batches)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
def test_epsilon_after_a_resume_from_the_optimizers_state_is_that_of_one_run(small_vit):
    whole = small_vit(depth=1)
    guard, optimizer, loader = prepared(whole, 2)
    trained(whole, guard, optimizer, loader, 4)
    first = small_vit(depth=1)
    trained(first, *(kept := prepared(first, 2)), 2)
    saved = kept[1].state_dict()
    second = small_vit(depth=1)
    resumed = prepared(second, 2)
    resumed[1].load_state_dict(saved)
    trained(second, *resumed, 2)
    assert resumed[0].privacy_spent().epsilon == guard.privacy_spent().epsilon
    assert kept[0].privacy_spent().epsilon < guard.privacy_spent().epsilon


def test_the_state_of_a_plain_optimizer_is_refused_and_nothing_is_loaded(small_vit):
    model = small_vit(depth=1)
    _, optimizer, _ = prepared(model)
    state = sgd(small_vit(depth=1)).state_dict()
    state["param_groups"][0]["lr"] = 7.0
    with pytest.raises(InputError, match="without a ledger"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_private_optimizer_is_not_copied_and_others_train_on(small_vit, how):
    """torch patches the class of an optimizer that is copied."""
    guard, optimizer, loader = prepared(small_vit(depth=1), 2)
    with pytest.raises(
        Incompatible, match=r"got a copy or pickle of it.*guard.prepare of Guard.of"
    ):
        how(optimizer)
    trained(guard.model, guard, optimizer, loader, 2)
    assert guard.privacy_spent().steps == 2


def test_the_state_that_torchs_distributed_checkpoints_take_is_refused_in_words(small_vit):
    """They step the optimizer for it, with zeros, and keep no ledger."""
    checkpoints = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    guard, optimizer, _ = prepared(model := small_vit(depth=1))
    with pytest.raises(Incompatible, match=r"state_dict\(\), which holds the ledger"):
        checkpoints.get_state_dict(model, optimizer)
    assert all(p.grad is None for p in model.parameters())
    assert not guard._ledgers["privacy"].history
