"""What a loader chose is honoured and accounted for, or refused before the first step."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tests.defenses.privacy.privacy_models import build
from tests.fast import fast_for
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.defenses.privacy.samplers import PoissonSampler
from vitguard.draws import Draws
from vitguard.errors import Incompatible, InputError, Unprotected
from vitguard.guard import protect

pytest.importorskip("opacus")
COUNT = 24


class Numbered(Dataset):
    """Image i holds i everywhere, and so does its label."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return torch.full((3, 32, 32), float(index)), index


def pairs(examples):
    images, labels = zip(*examples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def prepared(loader, model=None, **settings):
    model = build("vit", torch.float32) if model is None else model
    settings = {"noise": 1.0, "delta": 1e-3} | settings
    guard = protect(model, [DifferentialPrivacy(**settings)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return (model, guard, *guard.prepare(optimizer, loader))


def seen(loader, passes=30):
    """Return how often each record came, over several passes, and the sizes of the batches."""
    records, sizes = Counter(), []
    for _ in range(passes):
        for _images, labels in loader:
            real = loader.training.due.real
            records.update(labels[:real].tolist())
            sizes.append(real)
            loader.skip()
    return records, sizes


HONOURED = {
    "sequential": ({"batch_size": 4}, range(24), 6),
    "shuffle": ({"batch_size": 4, "shuffle": True}, range(24), 6),
    "drop last": ({"batch_size": 5, "drop_last": True}, range(24), 4),
    "not drop last": ({"batch_size": 5}, range(24), 5),
    "subset": ({"batch_size": 4, "sampler": SubsetRandomSampler(range(8, 16))}, range(8, 16), 2),
    "subset, drop last": (
        {"batch_size": 3, "sampler": SubsetRandomSampler([1, 3, 5, 7]), "drop_last": True},
        [1, 3, 5, 7], 1,
    ),
    "random of the first": (
        {"batch_size": 4, "sampler": RandomSampler(range(8))}, range(8), 2,
    ),
    "sequential of the first": (
        {"batch_size": 4, "sampler": SequentialSampler(range(8))}, range(8), 2,
    ),
    "plain batch sampler": (
        {"batch_sampler": BatchSampler(SubsetRandomSampler(range(8)), 4, False)}, range(8), 2,
    ),
    "distributed, of one": (
        {"batch_size": 4, "sampler": DistributedSampler(range(24), num_replicas=1, rank=0)},
        range(24), 6,
    ),
}  # fmt: skip


# two that name the same records in another way are enough, and all that leave some out
@pytest.mark.parametrize(
    "name", fast_for(HONOURED, fast=HONOURED.keys() - {"shuffle", "not drop last", "subset"})
)
def test_records_rate_and_steps_follow_what_the_loader_chose(name):
    settings, records, steps = HONOURED[name]
    _, _, _, loader = prepared(DataLoader(Numbered(), **settings))
    assert (len(loader), loader.rate, loader.records) == (steps, 1 / steps, len(records))
    assert loader.expected_batch_size == pytest.approx(len(records) / steps)
    counts, sizes = seen(loader)
    assert set(counts) == set(records)
    draws, rate = 30 * steps, 1 / steps
    spread = math.sqrt(draws * rate * (1 - rate))
    assert all(abs(n - draws * rate) <= 5 * spread for n in counts.values())
    assert len(sizes) == draws


def test_a_subset_is_accounted_for_as_the_data_set():
    sampler = SubsetRandomSampler(range(8))
    model, guard, optimizer, loader = prepared(
        DataLoader(Numbered(), batch_size=4, sampler=sampler)
    )
    for images, labels in loader:
        F.cross_entropy(model(images), labels % 10).backward()
        optimizer.step()
        optimizer.zero_grad()
    ((noise, rate, steps),) = guard._ledgers["privacy"].history
    assert (noise, rate, steps) == (1.0, 0.5, 2)


def test_delta_must_be_below_one_over_the_records_of_the_subset():
    sampler = SubsetRandomSampler(range(8))
    with pytest.raises(InputError, match="delta below 1 / 8"):
        prepared(DataLoader(Numbered(), batch_size=4, sampler=sampler), delta=0.2)
    prepared(DataLoader(Numbered(), batch_size=4, sampler=sampler), delta=0.1)


class Stream(IterableDataset):
    def __iter__(self):
        yield from (Numbered()[i] for i in range(COUNT))


class StreamWithALength(Stream):
    def __len__(self):
        return COUNT


class Curriculum(Sampler):
    def __init__(self):
        pass

    def __iter__(self):
        return iter(range(8))

    def __len__(self):
        return 8


class Grouped(Curriculum):
    """Batches of records alike."""

    def __iter__(self):
        return iter([[0, 1], [2, 3]])


class Buckets(BatchSampler):
    def __iter__(self):
        return iter([[0, 1], [2, 3]])


class HardExamples(SubsetRandomSampler):
    def __iter__(self):
        return iter([0, 0, 1])


class Repeated(DataLoader):
    def __iter__(self):
        for _ in range(3):
            yield from super().__iter__()


class WithoutLength(Dataset):
    def __getitem__(self, index):
        return Numbered()[index]


REFUSED = {
    "weighted": (
        lambda: DataLoader(Numbered(), 4, sampler=WeightedRandomSampler([1.0] * 24, 24)),
        "WeightedRandomSampler.*Weight the loss",
    ),
    "replacement": (
        lambda: DataLoader(Numbered(), 4, sampler=RandomSampler(Numbered(), replacement=True)),
        "RandomSampler with replacement.*shuffle=True",
    ),
    "num_samples": (
        lambda: DataLoader(Numbered(), 4, sampler=RandomSampler(Numbered(), num_samples=8)),
        "RandomSampler with num_samples.*shuffle=True",
    ),
    "custom sampler": (
        lambda: DataLoader(Numbered(), 4, sampler=Curriculum()),
        r"Curriculum.*torch\.utils\.data\.Subset",
    ),
    "subclass of a sampler": (
        lambda: DataLoader(Numbered(), 4, sampler=HardExamples(range(8))),
        r"HardExamples.*torch\.utils\.data\.Subset",
    ),
    "list as a sampler": (
        lambda: DataLoader(Numbered(), 4, sampler=[0, 1, 2, 3]),
        r"list.*torch\.utils\.data\.Subset",
    ),
    "custom batch sampler": (
        lambda: DataLoader(Numbered(), batch_sampler=Grouped()),
        "batch sampler Grouped.*batch_size in place",
    ),
    "subclass of a batch sampler": (
        lambda: DataLoader(Numbered(), batch_sampler=Buckets(SequentialSampler(range(8)), 2, True)),
        "batch sampler Buckets.*batch_size in place",
    ),
    "weighted in a batch sampler": (
        lambda: DataLoader(
            Numbered(), batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 24, 24), 4, True)
        ),
        "WeightedRandomSampler",
    ),
    "stream": (lambda: DataLoader(Stream(), 4), "Stream.*__getitem__"),
    "stream with a length": (lambda: DataLoader(StreamWithALength(), 4), "StreamWithALength"),
    "no length": (
        lambda: DataLoader(WithoutLength(), 4, sampler=SubsetRandomSampler(range(8))),
        "WithoutLength.*__len__",
    ),
    "no batch size": (lambda: DataLoader(Numbered(), batch_size=None), "batch_size=None"),
    "an index twice": (
        lambda: DataLoader(Numbered(), 4, sampler=SubsetRandomSampler([0, 1, 1, 2])),
        "SubsetRandomSampler of different indices.*4, 3 of them different",
    ),
    "an index outside": (
        lambda: DataLoader(Numbered(), 4, sampler=SubsetRandomSampler([0, 24])),
        "from 0 to 23",
    ),
    "an index twice in a subset": (
        lambda: DataLoader(Subset(Numbered(), [0, 1, 1, 2]), 2),
        "Subset of different indices",
    ),
    "distributed without a group": (
        lambda: DataLoader(Numbered(), 4, sampler=DistributedSampler(Numbered(), 2, 0)),
        "rank 0 of 1, got rank 0 of 2.*init_process_group",
    ),
    "loader with batches of its own": (
        lambda: Repeated(Numbered(), 4),
        "Repeated, which has a __iter__ of its own",
    ),
    "no loader": (lambda: list(range(8)), "Expected a DataLoader.*got list"),
    "one of Lightning's Fabric": (
        lambda: (
            pytest.importorskip("lightning.fabric")
            .Fabric(accelerator="cpu", devices=1)
            .setup_dataloaders(DataLoader(Numbered(), 4))
        ),
        "_FabricDataLoader around one.*to no other tool",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_poisson_draws_cannot_stand_for_is_refused_with_the_remedy(name):
    make, match = REFUSED[name]
    model = build("vit", torch.float32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Incompatible, match=match) as error:
        prepared(make(), model)
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in before)


def test_a_subset_of_the_data_set_is_drawn_from():
    _, _, _, loader = prepared(DataLoader(Subset(Numbered(), range(16, 24)), 4, shuffle=True))
    assert set(seen(loader)[0]) == set(range(16, 24))


def test_joined_data_sets_are_drawn_from():
    both = ConcatDataset([Subset(Numbered(), range(4)), Subset(Numbered(), range(20, 24))])
    _, _, _, loader = prepared(DataLoader(both, 4))
    assert set(seen(loader)[0]) == {0, 1, 2, 3, 20, 21, 22, 23}


class Files(Numbered):
    def __init__(self, name):
        self.samples = [(f"{name}/{i}.png", i) for i in range(COUNT)]


_ONE, _TENSORS = Numbered(), TensorDataset(torch.randn(COUNT, 3, 32, 32), torch.arange(COUNT))
JOINED = {
    "one set twice": (ConcatDataset([_ONE, _ONE]), COUNT),
    "a part of it again": (ConcatDataset([_ONE, Subset(_ONE, [3, 5])]), 2),
    "a part of what is joined": (Subset(ConcatDataset([_ONE, _ONE]), range(COUNT + 4)), 4),
    "parts that overlap": (ConcatDataset([Subset(_ONE, [0, 1]), Subset(_ONE, [1, 2])]), 1),
    "joined sets that are joined": (ConcatDataset([ConcatDataset([_ONE]), _ONE]), COUNT),
    "one tensor in two sets": (ConcatDataset([_TENSORS, TensorDataset(*_TENSORS.tensors)]), COUNT),
    "the same files": (ConcatDataset([Files("photos"), Files("photos")]), COUNT),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_record_that_joined_data_sets_hold_twice_is_refused(name):
    data, repeated = JOINED[name]
    with pytest.raises(Incompatible, match=f"got {repeated} of .* more often"):
        prepared(DataLoader(data, 4, shuffle=True, collate_fn=pairs))


def test_joined_data_sets_of_which_each_record_is_drawn_once_are_taken():
    twice = Subset(ConcatDataset([_ONE, _ONE]), range(COUNT))
    apart = ConcatDataset([Files("photos"), Files("others")])
    for data in (twice, apart, ConcatDataset([Numbered(), Numbered()])):
        assert prepared(DataLoader(data, 4, collate_fn=pairs))[3].records == len(data)


def test_an_empty_draw_never_shows_a_record_outside_the_subset():
    looked = []

    class Watching(Numbered):
        def __getitem__(self, index):
            looked.append(index)
            return super().__getitem__(index)

    sampler = SubsetRandomSampler([5, 9])
    _, _, _, loader = prepared(DataLoader(Watching(), batch_size=1, sampler=sampler))
    sizes = seen(loader)[1]
    assert 0 in sizes and set(looked) == {5, 9}


def remember(worker):
    """Note the worker in its copy of the data set."""
    torch.utils.data.get_worker_info().dataset.worker = worker + 100


class Tagged(Numbered):
    worker = 0

    def __getitem__(self, index):
        return torch.full((3, 32, 32), float(index)), index, self.worker


@pytest.mark.slow
def test_workers_collate_function_and_other_settings_are_carried_over():
    generator = torch.Generator().manual_seed(4)
    given = DataLoader(
        Tagged(), batch_size=6, num_workers=2, prefetch_factor=3, persistent_workers=True,
        worker_init_fn=remember, collate_fn=torch.utils.data.default_collate,
        generator=generator, timeout=600, multiprocessing_context="fork", in_order=False,
    )  # fmt: skip
    model, guard, optimizer, loader = prepared(given)
    kept = loader._loader
    for name in (
        "num_workers", "prefetch_factor", "persistent_workers", "worker_init_fn", "generator",
        "timeout", "multiprocessing_context", "in_order", "pin_memory", "pin_memory_device",
    ):  # fmt: skip
        assert getattr(kept, name) is getattr(given, name) or getattr(kept, name) == getattr(
            given, name
        )
    workers = set()
    for _ in range(2):
        for images, labels, tags in loader:  # two workers prefetch: the announcement waits
            assert len(images) == loader.training.due.size
            workers.update(tags[: loader.training.due.real].tolist())
            F.cross_entropy(model(images), labels % 10).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert workers <= {100, 101} and workers
    assert guard.privacy_spent().steps == 8


def test_batches_as_dictionaries_and_pieces_of_them_work():
    def collate(examples):
        images, labels = pairs(examples)
        return {"pixels": images, "labels": labels, "names": ["same"] * 3}

    given = DataLoader(Numbered(), batch_size=12, collate_fn=collate)
    _, _, _, loader = prepared(given, physical_batch=4)
    for batch in loader:
        assert len(batch["pixels"]) == len(batch["labels"]) <= 4 and len(batch["names"]) == 3
        loader.skip()


@pytest.mark.slow
def test_a_prepared_loader_can_be_prepared_again():
    _, guard, optimizer, loader = prepared(DataLoader(Numbered(), batch_size=4))
    _, again = guard.prepare(optimizer, loader)
    assert (len(again), again.records) == (6, 24)
    with pytest.raises(Unprotected, match="prepared again"):
        next(iter(loader))


def test_poisson_draws_are_independent_over_records_and_batches():
    sampler = PoissonSampler(range(100), 0.3, 4000, Draws())
    joined = torch.zeros(4000, 100, dtype=torch.float64)
    for i, batch in enumerate(sampler):
        assert sorted(set(batch)) == batch
        joined[i, batch] = 1
    assert joined.mean().item() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 400_000))
    centred = (joined - 0.3) / math.sqrt(0.21)
    between = (centred.T @ centred / 4000).fill_diagonal_(0)  # records of one batch
    assert between.abs().max() * math.sqrt(4000) < 6
    after = (centred[1:] * centred[:-1]).mean(0)  # a record in one batch and the next
    assert after.abs().max() * math.sqrt(3999) < 5


def test_processes_draw_from_shares_that_make_up_the_records():
    shares = []
    for rank in range(3):
        (batch,) = PoissonSampler(range(3, 14), 1.0, 1, Draws(), rank=rank, world=3)
        shares.append(set(batch))
    assert shares[1] == {4, 7, 10, 13}
    assert set.union(*shares) == set(range(3, 14)) and sum(map(len, shares)) == 11


def test_draws_do_not_follow_torchs_seed():
    data = TensorDataset(torch.randn(24, 3, 32, 32), torch.arange(24))
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        _, _, _, loader = prepared(DataLoader(data, batch_size=6, shuffle=True))
        torch.manual_seed(0)
        batches = []
        for _images, labels in loader:
            batches.append(labels.tolist())
            loader.skip()
        drawn.append(batches)
    assert drawn[0] != drawn[1]
