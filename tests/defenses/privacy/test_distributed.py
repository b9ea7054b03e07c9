"""Several processes: one draw of noise on the sum, equal replicas, and nothing without noise."""

import os
import socket
from datetime import timedelta

import pytest
import torch
from torch import distributed
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler, TensorDataset

from tests.defenses.privacy.privacy_models import build
from vitguard.defenses.base import Draws
from vitguard.defenses.privacy import DifferentialPrivacy, measure_noise
from vitguard.errors import Incompatible, Unprotected

pytest.importorskip("opacus")
NOISE, CLIP, COUNT, STEPS = 2.0, 0.25, 24, 4


def data():
    torch.manual_seed(5)
    return TensorDataset(torch.randn(COUNT, 3, 32, 32), torch.arange(COUNT) % 10)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def prepared(model, sampler=None, batch_size=COUNT // STEPS):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(data(), batch_size=batch_size, sampler=sampler)
    defense = DifferentialPrivacy(noise=NOISE, clip=CLIP, delta=1e-3)
    return defense.prepare(model, optimizer, loader, Draws())


def steps(model, optimizer, loader, scale=0.0):
    """Yield what each step moved, as a sum over all processes."""
    for images, labels in loader:
        before = weights(model)
        (scale * F.cross_entropy(model(images), labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = before - weights(model)
        yield moved * COUNT * loader.rate


def join(rank, world, port):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
        timeout=timedelta(seconds=600),
    )  # fmt: skip


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run(worker, world, *args):
    """Run worker(rank, world, ports, found, *args) in processes; return what each found."""
    with torch.multiprocessing.Manager() as manager:
        found = manager.dict()
        given = (world, free_ports(2), found, *args)
        torch.multiprocessing.spawn(worker, args=given, nprocs=world)
        return dict(found)


def _noise(rank, world):
    model = build("vit", torch.float32)
    optimizer, loader, ledger = prepared(model)
    moved = torch.cat(list(steps(model, optimizer, loader)))
    shares = loader.batch_sampler._own.tolist()
    return moved, weights(model), ledger.history, shares, optimizer.expected_batch_size


def expect_one_draw(found, world):
    fit = measure_noise(found[0][0], NOISE * CLIP)
    assert fit.ratio == pytest.approx(1, abs=0.01) and fit.p_value > 1e-4
    for rank in range(world):
        _, after, history, shares, expected = found[rank]
        assert torch.equal(after, found[0][1])
        assert history == [(NOISE, 0.25, STEPS)] and expected == 6 / world
        assert shares == list(range(rank, COUNT, world))


def _gradient(rank, world):
    model = build("vit", torch.float32)
    optimizer, loader, _ = prepared(model, batch_size=COUNT)  # a rate of one: all records join
    optimizer.noise_multiplier = 0.0
    (moved,) = steps(model, optimizer, loader, scale=1e4)
    return moved


def _three(rank, world, ports, found):
    join(rank, world, ports[0])
    found["noise", rank] = _noise(rank, world)
    model = build("vit", torch.float32)
    optimizer, loader, _ = prepared(model)
    taken = steps(model, optimizer, loader, scale=1e4)
    first = [next(taken), next(taken)]
    assert all(m.norm() > 0 for m in first)
    before = weights(model)
    if rank == world - 1:
        os._exit(0)
    try:
        next(taken)
        found["went on", rank] = "stepped"
        return
    except Unprotected as error:
        assert "nothing was applied" in str(error), error
    distributed.destroy_process_group()
    assert torch.equal(before, weights(model))
    assert all(p.grad is None for p in model.parameters())

    def refused(match):
        batch = next(iter(loader))
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        with pytest.raises(Unprotected, match=match):
            optimizer.step()
        assert torch.equal(before, weights(model))

    refused("got rank 0 of 1")  # alone
    join(rank, world - 1, ports[1])
    refused(f"rank {rank} of {world}, got rank {rank} of {world - 1}")
    optimizer, loader, ledger = prepared(model)
    moved = torch.cat(list(steps(model, optimizer, loader)))
    found["went on", rank] = (moved, weights(model), ledger.history)


def _prepared_before(rank, world, ports):
    model = build("vit", torch.float32)
    optimizer, loader, ledger = prepared(model)
    join(rank, world, ports[0])
    before = weights(model)
    images, labels = next(iter(loader))
    F.cross_entropy(model(images), labels).backward()
    with pytest.raises(Unprotected, match=f"rank 0 of 1, got rank {rank} of 2"):
        optimizer.step()
    return torch.equal(before, weights(model)) and not ledger.history


def _samplers(rank):
    shared = prepared(build("vit", torch.float32), DistributedSampler(data()), 3)[1]
    with pytest.raises(Incompatible, match=r"rank \d of 2, got rank 0 of 4"):
        prepared(build("vit", torch.float32), DistributedSampler(data(), 4, 0), 3)
    with pytest.raises(Incompatible, match=rf"rank {rank} of 2, got rank {1 - rank} of 2"):
        prepared(build("vit", torch.float32), DistributedSampler(data(), 2, 1 - rank), 3)
    subset = prepared(build("vit", torch.float32), SubsetRandomSampler(range(10)), 5)[1]
    return (
        (shared.rate, shared.expected_batch_size, len(shared), shared.batch_sampler._own.tolist()),
        (subset.rate, subset.expected_batch_size, len(subset), subset.batch_sampler._own.tolist()),
    )


def _other_clip(rank):
    model = build("vit", torch.float32)
    optimizer, loader, ledger = prepared(model)
    optimizer.max_grad_norm = CLIP * (1 + rank)
    before = weights(model)
    with pytest.raises(Unprotected, match="same noise_multiplier, max_grad_norm"):
        next(steps(model, optimizer, loader))
    return torch.equal(before, weights(model)) and not ledger.history


def _two(rank, world, ports, found):
    found["prepared before", rank] = _prepared_before(rank, world, ports)
    found["noise", rank] = _noise(rank, world)
    found["gradient", rank] = _gradient(rank, world)
    found["samplers", rank] = _samplers(rank)
    found["other clip", rank] = _other_clip(rank)


@pytest.fixture(scope="module")
def two():
    """Return what two processes found, by what they did and rank."""
    return run(_two, 2)


@pytest.fixture(scope="module")
def three():
    """Return what three processes found before one dropped out, and two after it."""
    return run(_three, 3)


def of(found, what):
    return {rank: value for (name, rank), value in found.items() if name == what}


@pytest.mark.slow
def test_noise_on_the_sum_of_two_processes_is_that_of_one_draw(two):
    expect_one_draw(of(two, "noise"), 2)


@pytest.mark.slow
def test_noise_on_the_sum_of_three_processes_is_that_of_one_draw(three):
    expect_one_draw(of(three, "noise"), 3)


@pytest.mark.slow
def test_when_one_of_three_drops_out_nothing_is_applied_and_two_go_on_with_one_draw(three):
    found = of(three, "went on")
    assert found.keys() == {0, 1} and "stepped" not in found.values()
    fit = measure_noise(found[0][0], NOISE * CLIP)
    assert fit.ratio == pytest.approx(1, abs=0.01) and fit.p_value > 1e-4
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == [(NOISE, 0.25, STEPS)]


@pytest.mark.slow
def test_the_sum_of_two_processes_is_that_of_one(two):
    found = of(two, "gradient")
    alone = _gradient(0, 1)
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], alone, atol=1e-4) and alone.norm() > CLIP


@pytest.mark.slow
def test_a_step_of_more_processes_than_were_prepared_raises_before_anything_moves(two):
    assert of(two, "prepared before") == {0: True, 1: True}


@pytest.mark.slow
def test_processes_that_would_clip_differently_raise_before_anything_moves(two):
    assert of(two, "other clip") == {0: True, 1: True}


@pytest.mark.slow
def test_a_distributed_sampler_is_honoured_where_it_fits_the_processes(two):
    for rank, (shared, subset) in of(two, "samplers").items():
        assert shared == (0.25, 3.0, 4, list(range(rank, COUNT, 2)))
        assert subset == (0.5, 2.5, 2, list(range(rank, 10, 2)))
