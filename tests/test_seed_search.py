"""No seed explains a release, and no two releases share a draw, however the guard got there."""

import copy
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.fast import crossed
from vitguard.core import Batch, Update
from vitguard.defenses.base import Draws
from vitguard.guard import Guard

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1}
NOISE, CLIP, COUNT = 2.0, 1e-2, 40
RANGE = 2**16


def benchmark(name):
    """Import one of the scripts under benchmarks/."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


seeds = benchmark("seed_search")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler named cc: the seed search cannot be built")
    return seeds.compiled(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, 3, 16, 16, generator=generator), torch.arange(COUNT) % 2


def build(*stack):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **SIZES).train()
    return vg.protect(model, list(stack))


def private():
    return vg.DifferentialPrivacy(noise=NOISE, clip=CLIP, delta=1e-5)


def clipped(guard, images, labels):
    with guard.rehearsing():
        return guard.defenses[0].clipped_sum(guard.model, F.cross_entropy, Batch(images, labels))


# --- the search


@pytest.mark.parametrize("seed", [0, 41, 2**31 + 5, 2**32 - 1, 2**32 + 77, 3 * 2**61 + 12345])
def test_the_search_finds_the_seed_of_a_torch_generator_from_one_update(program, data, seed):
    images, labels = data[0][:1], data[1][:1]
    guard = build(private())
    sums = clipped(guard, images, labels)
    released = seeds.planted(sums, NOISE * CLIP, 1, seed)
    start = min(max(seed % 2**32 - RANGE // 2, 0), 2**32 - RANGE)
    found = seeds.search(program, released, NOISE * CLIP, 1, norm=CLIP, start=start, count=RANGE)
    assert found.seeds == (seed % 2**32,)
    clean = seeds.subtract(Update(tensors=released, batch_size=1), NOISE * CLIP, found.seeds[0])
    worst = max(float((clean.tensors[k] - s).abs().max()) for k, s in sums.items())
    assert worst < 1e-6 * NOISE * CLIP


def test_the_search_knows_how_many_outputs_were_used_before(program):
    generator = torch.Generator().manual_seed(1234)
    torch.rand(6, generator=generator)
    released = {"w": torch.randn(64, generator=generator)}
    kept = dict(norm=0.1, start=0, count=RANGE)
    assert seeds.search(program, released, 1.0, 1, skip=6, **kept).seeds == (1234,)
    assert seeds.search(program, released, 1.0, 1, **kept).seeds == ()


def test_the_search_finds_nothing_in_an_update_of_the_guard(program, data):
    guard = build(private())
    update = guard.update(data[0][:1], data[1][:1])
    # of a source that starts from a torch.Generator, the seeds around its own
    truth = seeds.seed_inside(guard)
    start = 0 if truth is None else min(max(truth - RANGE // 2, 0), 2**32 - RANGE)
    found = seeds.search(
        program, update.tensors, NOISE * CLIP, 1, norm=CLIP, start=start, count=RANGE
    )
    assert found.seeds == ()
    assert truth is None


# --- streams


def test_seeds_that_differ_by_2_to_the_32_give_a_torch_generator_one_stream():
    one, other = (torch.Generator().manual_seed(s) for s in (7, 7 + 2**32))
    assert torch.equal(torch.randn(64, generator=one), torch.randn(64, generator=other))


def test_draws_from_a_torch_generator_are_no_better_and_say_so():
    one, other = (Draws(torch.Generator().manual_seed(s)) for s in (7, 7 + 2**32))
    assert np.array_equal(one.words(64), other.words(64))
    assert "seed" in one.void
    assert Draws().void == ""


@pytest.mark.parametrize("bit", [0, 31, 32, 63, 64, 255])
def test_every_one_of_the_256_bits_of_a_key_changes_the_stream(monkeypatch, bit):
    def words(key):
        import vitguard.draws

        monkeypatch.setattr(vitguard.draws.secrets, "token_bytes", lambda n: key.to_bytes(n))
        return Draws().words(1000)

    assert np.array_equal(words(7), words(7))
    same = int((words(7) == words(7 ^ (1 << bit))).sum())
    assert same == 0


# --- what a release draws


class Update1:
    """The noise of `guard.update`."""

    def make():
        return build(private())

    def draw(guard, images, labels):
        update = guard.update(images[:1], labels[:1])
        sums = clipped(guard, images[:1], labels[:1])
        return flat({k: update.tensors[k].double() - s.double() for k, s in sums.items()})


class Loop:
    """The noise of a step of the private loop."""

    def make():
        return build(private())

    def draw(guard, images, labels):
        pytest.importorskip("opacus")
        model = guard.model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        data = TensorDataset(images[:1], labels[:1])
        optimizer, loader = guard.prepare(optimizer, DataLoader(data, batch_size=1))
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        sums = clipped(guard, images[:1], labels[:1])
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        return flat({k: g.double() - sums[k].double() for k, g in grads.items()})


class Client:
    """The noise of `ClientPrivacy`."""

    def make():
        return build(vg.ClientPrivacy(noise=NOISE, clip=CLIP))

    def draw(guard, images, labels):
        zeros = {k: torch.zeros_like(p) for k, p in guard.public_model().named_parameters()}
        return flat(guard.seal(Update(tensors=zeros, batch_size=1)).tensors)


class Masks:
    """Which patches `PatchShuffle` moves, and where to."""

    def make():
        return build(vg.PatchShuffle())

    def draw(guard, images, labels):
        guard.update(images, labels)
        truth = guard.truth()
        return torch.cat([truth[k].flatten().double() for k in sorted(truth)])


class Poisson:
    """Which examples a private batch takes."""

    def make():
        return build(private())

    def draw(guard, images, labels):
        pytest.importorskip("opacus")
        marked = images.clone()
        marked[:, 0, 0, 0] = torch.arange(COUNT) + 1.0
        optimizer = torch.optim.SGD(guard.model.parameters(), lr=0.0)
        loader = DataLoader(TensorDataset(marked, labels), batch_size=COUNT // 4)
        loader = guard.prepare(optimizer, loader)[1]
        taken = torch.zeros(len(loader), COUNT + 1)
        for i, (x, y) in enumerate(loader):
            taken[i, x[:, 0, 0, 0].round().long()] = 1
            F.cross_entropy(guard.model(x), y).backward()
            guard.model.zero_grad()
            break_off = getattr(loader, "abandon", None)
            if break_off is not None:
                break_off()
            break
        return taken.flatten().double()


class Rounding:
    """How an encryptor rounds: the source that it draws from, in its own words."""

    def make():
        return Draws()

    def draw(source, images, labels):
        return torch.from_numpy(np.array(source.uniform(1000)))


GAUSSIAN = (Update1, Loop, Client)
KINDS = (*GAUSSIAN, Masks, Poisson, Rounding)


def flat(tensors):
    return torch.cat([tensors[k].detach().double().flatten() for k in sorted(tensors)])


# --- how the second release comes about


def of(model):
    return model if isinstance(model, Draws) else Guard.of(model)


def bare(guard):
    return guard if isinstance(guard, Draws) else guard.model


def again(kind, draw):
    guard = kind.make()
    return [draw(guard), draw(guard)]


def loaded(kind, draw):
    guard = kind.make()
    if isinstance(guard, Draws):
        pytest.skip("a source has no state to save")
    state = copy.deepcopy(guard.state_dict())
    first = draw(guard)
    others = [kind.make(), kind.make()]
    for other in others:
        other.load_state_dict(copy.deepcopy(state))
    return [first, *map(draw, others)]


def copied(kind, draw):
    guard = kind.make()
    others = [of(copy.deepcopy(bare(guard))) for _ in range(2)]
    return [draw(guard), *map(draw, others)]


def pickled(kind, draw):
    guard = kind.make()
    data = pickle.dumps(bare(guard))
    return [draw(guard), *(draw(of(pickle.loads(data))) for _ in range(2))]


def forked(kind, draw):
    guard = kind.make()
    return [*(in_a_fork(lambda: draw(guard)) for _ in range(2)), draw(guard)]


def in_processes(kind, draw):
    guard = kind.make()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work():
        try:
            queue.put(draw(guard).numpy())
        except BaseException as error:
            queue.put(error)
            raise

    workers = [context.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    return [torch.from_numpy(r) for r in results]


def in_threads(kind, draw):
    guards = [kind.make() for _ in range(3)]
    results = [None] * len(guards)

    def work(i):
        results[i] = draw(guards[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(guards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def in_a_fork(act):
    """Return the tensor that `act` gives in a child process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(act().numpy(), pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        result = pickle.load(pipe)
    os.waitpid(child, 0)
    return torch.from_numpy(result)


WAYS = (again, loaded, copied, pickled, forked, in_processes, in_threads)


@pytest.mark.parametrize(
    ("kind", "way"), crossed(KINDS, WAYS, rounds=2), ids=lambda value: value.__name__.lower()
)
def test_two_releases_never_share_a_draw(kind, way, data):
    if way in (forked, in_processes) and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    releases = way(kind, lambda guard: kind.draw(guard, *data))
    assert all(r is not None for r in releases)
    for i, one in enumerate(releases):
        for other in releases[:i]:
            if kind in GAUSSIAN:
                # independent noise: the difference has sqrt(2) of the deviation
                ratio = float((one - other).norm()) / (NOISE * CLIP * (2 * len(one)) ** 0.5)
                assert 0.9 < ratio < 1.1
            else:
                assert not torch.equal(one, other)


def test_two_encryptors_and_their_source_round_by_draws(monkeypatch):
    # the ciphertexts hide the rounding; what is counted is who asks for it
    from vitguard.defenses.encryption import Encryptor, KeySet, Manifest

    asked = []
    uniform = Draws.uniform
    monkeypatch.setattr(
        Draws, "uniform", lambda self, count: asked.append(uniform(self, count)) or asked[-1]
    )
    values = {"w": torch.linspace(-0.9, 0.9, 500)}
    keys, manifest = KeySet.generate(), Manifest.of(values, bounds=1.0)
    for name in ("a", "b"):
        Encryptor(keys, manifest, client_id=name).encrypt(values, round_id=0)
    assert len(asked) == 2
    assert not np.array_equal(*asked)
