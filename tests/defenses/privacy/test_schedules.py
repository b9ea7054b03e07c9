"""The ledger holds what a step really added, and holds it before the step is taken."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.defenses.privacy.privacy_models import build
from tests.fast import fast_for
from vitguard.defenses.privacy import DifferentialPrivacy, Ledger, measure_noise
from vitguard.errors import Incompatible, Unprotected
from vitguard.guard import protect

pytest.importorskip("opacus")
BATCH = 6


def prepared(*, lr=1.0, count=24, batch=BATCH, generator=None, **settings):
    settings = {"noise": 4.0, "delta": 1e-3, "clip": 0.5} | settings
    torch.manual_seed(5)
    data = TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(0, 10, (count,)))
    model = build("vit", torch.float32)
    guard = protect(model, [DifferentialPrivacy(**settings)], generator=generator)
    optimizer, loader = guard.prepare(
        torch.optim.SGD(model.parameters(), lr=lr), DataLoader(data, batch_size=batch)
    )
    return model, guard, optimizer, loader


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step_on_noise(model, optimizer, batch):
    """Step on a batch whose loss is zero, and return what moved, as a sum over the batch."""
    before = weights(model)
    (0 * F.cross_entropy(model(batch[0]), batch[1])).backward()
    optimizer.step()
    optimizer.zero_grad()
    return (before - weights(model)) * BATCH


def history(guard):
    return guard._ledgers["privacy"].history


@pytest.mark.slow
@pytest.mark.parametrize("physical", [None, 3])
def test_a_noise_schedule_is_recorded_step_by_step_as_it_was_added(physical):
    from opacus.schedulers import ExponentialNoise

    model, guard, optimizer, loader = prepared(physical_batch=physical)
    scheduler = ExponentialNoise(optimizer, gamma=0.125)
    wanted = []
    for batch in loader:
        wanted.append((optimizer.noise_multiplier, 0.25, 1))
        moved = step_on_noise(model, optimizer, batch)
        if loader.ends_step:
            fit = measure_noise(moved, wanted[-1][0] * 0.5)
            assert fit.ratio == pytest.approx(1, abs=0.02)
            scheduler.step()
        else:
            wanted.pop()
            assert not moved.any()
    assert [n for n, _, _ in wanted] == [4.0, 0.5, 0.0625, 0.0078125]
    assert history(guard) == wanted
    expected = Ledger(wanted).spent(1e-3).epsilon
    assert guard.privacy_spent().epsilon == pytest.approx(expected) and expected > 100


@pytest.mark.slow
def test_a_clip_schedule_changes_clip_and_noise_together():
    from opacus.schedulers import ExponentialGradClip

    model, guard, optimizer, loader = prepared(noise=2.0)
    scheduler = ExponentialGradClip(optimizer, gamma=0.1)
    for batch in loader:
        clip = optimizer.max_grad_norm
        moved = step_on_noise(model, optimizer, batch)
        assert measure_noise(moved, 2.0 * clip).ratio == pytest.approx(1, abs=0.02)
        scheduler.step()
    assert clip == pytest.approx(0.5 * 0.1**3) and history(guard) == [(2.0, 0.25, 4)]


@pytest.mark.slow
def test_a_clip_that_changes_between_pieces_counts_from_the_next_batch():
    model, _, optimizer, loader = prepared(noise=1e-9, physical_batch=1, clip=0.5, batch=24)
    before = weights(model)
    for i, (images, labels) in enumerate(loader):
        optimizer.max_grad_norm = 0.5 if i == 0 else 1e6
        (1e4 * F.cross_entropy(model(images), labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if loader.ends_step:
            break
    moved = (before - weights(model)).norm() * 24
    assert i == 23 and moved <= 0.5 * (i + 1) * (1 + 1e-4)


BAD = {
    "noise_multiplier": [-1.0, math.nan, math.inf, -math.inf, None, "loud"],
    "max_grad_norm": [-1.0, 0.0, math.nan, math.inf, None],
}


VALUES = [f"{name} {value}" for name, values in BAD.items() for value in values]
FEW = ("noise_multiplier -1.0", "noise_multiplier nan", "max_grad_norm 0.0", "max_grad_norm None")


@pytest.mark.parametrize("case", fast_for(VALUES, fast=FEW))  # of each kind of number one
def test_a_value_that_is_no_noise_or_clip_raises_and_nothing_moves(case):
    name = case.split()[0]
    value = next(v for v in BAD[name] if f"{name} {v}" == case)
    model, guard, optimizer, loader = prepared()
    images, labels = next(iter(loader))
    F.cross_entropy(model(images), labels).backward()
    before = weights(model)
    setattr(optimizer, name, value)
    with pytest.raises(Unprotected, match=f"finite {name}"):
        optimizer.step()
    assert torch.equal(before, weights(model)) and history(guard) == []
    assert all(p.grad is None for p in model.parameters())


def test_noise_set_to_zero_by_hand_shows_as_an_infinite_epsilon():
    model, guard, optimizer, loader = prepared()
    optimizer.noise_multiplier = 0.0
    step_on_noise(model, optimizer, next(iter(loader)))
    assert history(guard) == [(0.0, 0.25, 1)]
    assert guard.privacy_spent().epsilon == math.inf


def test_a_step_is_in_the_ledger_before_its_noise_is_drawn(monkeypatch):
    model, guard, optimizer, loader = prepared()
    images, labels = next(iter(loader))
    F.cross_entropy(model(images), labels).backward()
    before = weights(model)

    def broken(self, totals, deviation):
        assert history(guard) == [(4.0, 0.25, 1)]
        raise MemoryError

    monkeypatch.setattr("vitguard.draws.Draws.noised_all", broken)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert torch.equal(before, weights(model)) and history(guard) == [(4.0, 0.25, 1)]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_a_schedule_cannot_go_past_the_target_epsilon():
    model, guard, optimizer, loader = prepared(noise=None, epsilon=3.0, epochs=4, accountant="rdp")
    step_on_noise(model, optimizer, next(iter(loader)))
    images, labels = next(iter(loader))
    F.cross_entropy(model(images), labels).backward()
    before = weights(model)
    optimizer.noise_multiplier = 0.1
    with pytest.raises(Unprotected, match="at most epsilon 3"):
        optimizer.step()
    assert torch.equal(before, weights(model)) and len(history(guard)) == 1
    assert guard.privacy_spent().epsilon <= 3.0


@pytest.mark.slow
def test_what_leaves_a_step_lies_on_the_grid_of_its_noise():
    model, _, optimizer, loader = prepared(noise=1.0, clip=0.5)
    images, labels = next(iter(loader))
    F.cross_entropy(model(images), labels).backward()
    optimizer.scale_grad = lambda: None
    optimizer.step()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    steps = gradients / (0.5 / 1024)
    assert torch.equal(steps, steps.round()) and gradients.any()


@pytest.mark.parametrize("seeded", [True, False])
def test_noise_of_a_step_follows_no_seed_of_torch(seeded):
    moved = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(1) if seeded else None
        model, guard, optimizer, loader = prepared(generator=generator)
        batch = next(iter(loader))
        torch.manual_seed(0)
        moved.append(step_on_noise(model, optimizer, batch))
    assert torch.equal(*moved) == seeded
    assert (guard.privacy_spent().epsilon == math.inf) == seeded  # a generator's noise is void


def test_a_learning_rate_schedule_that_counts_pieces_is_refused_before_a_weight_moves():
    model, guard, optimizer, loader = prepared(physical_batch=1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    before = weights(model)
    with pytest.raises(Incompatible, match="ends_step"):
        for batch in loader:
            step_on_noise(model, optimizer, batch)
            if loader.ends_step:  # a batch of one or none tells nothing
                before = weights(model)
            scheduler.step()
    assert torch.equal(weights(model), before) and len(history(guard)) <= 1
