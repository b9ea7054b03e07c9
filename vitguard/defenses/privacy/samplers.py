"""Poisson draws of records, and what a loader's own sampler means for them.

A sampler that gives each record of a set once is honoured: the draws are from that set. Any other
is refused, because privacy would account for something else than what it does.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from vitguard.defenses.base import Draws
from vitguard.errors import Incompatible, expected

__all__ = ["PoissonSampler", "place", "records_of", "refuse_change"]

_SUBSET = "Choose records with torch.utils.data.Subset(dataset, indices) and leave the sampler out."


class PoissonSampler(Sampler[list[int]]):
    """Batches of indices: each record joins each batch independently with probability `rate`.

    Of several processes each draws from its own share of the records: every `world`-th, from
    `rank` on.

    Args:
        records: The indices that may be drawn, each once.
        rate: In (0, 1].
        steps: Batches in one pass.
    """

    def __init__(
        self,
        records: Sequence[int],
        rate: float,
        steps: int,
        draws: Draws,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rate, self.steps = rate, steps
        self._own = np.asarray(records, dtype=np.int64)[rank::world]
        self._draws = draws

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise refuse_change(f"{name} of a sampler")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield self._own[self._draws.chosen(len(self._own), self.rate)].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: every draw is fresh. For loops written for `DistributedSampler`."""


def refuse_change(what: str) -> Incompatible:
    """Return the error for a change after guard.prepare, which the ledger would not see."""
    return Incompatible(
        f"Expected a prepared loader to stay as it is, got another {what}: noise and ledger go by "
        "the old one. Change the loader that you made, and call guard.prepare with it again."
    )


def place() -> tuple[int, int]:
    """Return this process's rank and the number of processes that train together."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def records_of(loader: Any) -> Sequence[int]:
    """Return the indices of the dataset that a loader's sampler gives, each once.

    Raises:
        Incompatible: It gives some more often or with other chances than others, or in groups of
            its own, so that Poisson draws would not be what was asked for.
    """
    _check_loader(loader)
    records = _given(loader)
    _refuse_repeats(loader.dataset, records)
    return records


def _given(loader: DataLoader) -> Sequence[int]:
    size = len(cast(Sized, loader.dataset))
    sampler = _sampler_of(loader)
    kind = type(sampler)
    if kind is SequentialSampler:
        return _first(sampler.data_source, size, kind.__name__)
    if kind is RandomSampler:
        if sampler.replacement or sampler.num_samples != len(sampler.data_source):
            how = "replacement" if sampler.replacement else "num_samples"
            raise _refused(
                f"RandomSampler with {how}", "each record joins a batch independently and at most "
                "once: use shuffle=True.",
            )  # fmt: skip
        return _first(sampler.data_source, size, kind.__name__)
    if kind is SubsetRandomSampler:
        return _distinct(sampler.indices, size, kind.__name__)
    if kind is DistributedSampler:
        return _shared(sampler, size)
    if "Weighted" in kind.__name__:
        raise _refused(
            kind.__name__, "a record that is drawn more often than others spends more privacy than "
            "they do, which no ledger here counts. Weight the loss of each example instead.",
        )  # fmt: skip
    raise _refused(kind.__name__, _SUBSET)


def _check_loader(loader: Any) -> None:
    inside = getattr(loader, "_dataloader", None)  # Lightning's Fabric
    if not isinstance(loader, DataLoader) and isinstance(inside, DataLoader):
        raise Incompatible(
            f"Expected a plain DataLoader, got {type(loader).__name__} around one. Pass the "
            "torch.utils.data.DataLoader to guard.prepare, and what that returns to no other tool."
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        over = f" over {type(loader.dataset).__name__}" if isinstance(loader, DataLoader) else ""
        raise Incompatible(
            f"Expected a DataLoader over a dataset with a length, got {type(loader).__name__}"
            f"{over}: Poisson sampling draws every example independently. Use a dataset with "
            "__getitem__ and __len__."
        )
    for name in ("__iter__", "__len__"):
        if getattr(type(loader), name) is not getattr(DataLoader, name):
            raise Incompatible(
                f"Expected a plain DataLoader, got {type(loader).__name__}, which has a {name} of "
                "its own that Poisson batches would leave out. Pass torch.utils.data.DataLoader, "
                "before other tools wrap it."
            )
    if not isinstance(loader.dataset, Sized):
        raise Incompatible(
            f"Expected a dataset with a length, got {type(loader.dataset).__name__}: Poisson "
            "sampling draws every example independently. Give it a __len__."
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise Incompatible(
            "Expected a loader that makes batches of single examples, got batch_size=None: what "
            "one record adds cannot be told in batches that the dataset makes. Set batch_size and "
            "let the dataset return one example for an index."
        )
    _distinct_subset(loader.dataset)
    if not len(loader):
        raise expected("a loader with at least one batch", 0)


def _sampler_of(loader: DataLoader) -> Any:
    if loader.batch_size is not None:
        return loader.sampler
    given: Any = loader.batch_sampler
    if type(given) is not BatchSampler:
        raise _refused(
            f"the batch sampler {type(given).__name__}", "batches that were put together "
            "otherwise are no Poisson sample: set batch_size in place of batch_sampler.",
        )  # fmt: skip
    return given.sampler


def _first(source: Any, size: int, name: str) -> Sequence[int]:
    """Return the indices of a sampler over all of `source`."""
    if not 0 < len(source) <= size:
        raise expected(f"a {name} over at most the {size} records of the dataset", len(source))
    return range(len(source))


def _distinct(indices: Any, size: int, name: str) -> Sequence[int]:
    chosen = [int(i) for i in indices]
    if not chosen:
        raise expected(f"a {name} of at least one record", "an empty one")
    if len(set(chosen)) != len(chosen) or not set(chosen) <= set(range(size)):
        raise Incompatible(
            f"Expected a {name} of different indices from 0 to {size - 1}, got {len(chosen)}, "
            f"{len(set(chosen))} of them different. A record that joins twice spends more privacy: "
            "give each index once."
        )
    return chosen


def _distinct_subset(dataset: Any) -> None:
    while isinstance(dataset, Subset):
        _distinct(dataset.indices, len(cast(Sized, dataset.dataset)), "Subset")
        dataset = dataset.dataset


def _refuse_repeats(dataset: Any, records: Sequence[int]) -> None:
    """Raise Incompatible where joined data sets hold a record twice: it would join by two ways.

    Seen where the parts lead to one data set or one tensor, or name the same files.
    """
    if not _joins(dataset):
        return
    counts = Counter(_origin(dataset, index) for index in records)
    if repeated := sum(n > 1 for n in counts.values()):
        raise Incompatible(
            f"Expected each record once in the joined data sets, got {repeated} of {len(counts)} "
            "more often: one that joins a batch by two ways spends more privacy than is counted. "
            "Join different records; augment where a record is read, and weight its loss."
        )


def _joins(dataset: Any) -> bool:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return isinstance(dataset, ConcatDataset)


def _origin(dataset: Any, index: int) -> tuple[Any, ...]:
    """Return what tells the record at an index of nested data sets from all others."""
    while True:
        if isinstance(dataset, Subset):
            dataset, index = dataset.dataset, int(dataset.indices[index])
        elif isinstance(dataset, ConcatDataset):
            part = bisect.bisect_right(dataset.cumulative_sizes, index)
            before = dataset.cumulative_sizes[part - 1] if part else 0
            dataset, index = dataset.datasets[part], index - before
        else:
            break
    if isinstance(dataset, TensorDataset):
        row = dataset.tensors[0][index]
        return (row.data_ptr(), tuple(row.shape), str(row.device))
    named = getattr(dataset, "samples", None)  # of torchvision's folders: (file, class)
    if isinstance(named, list) and len(named) == len(dataset):
        return ("file", str(named[index]))
    return (id(dataset), index)


def _shared(sampler: DistributedSampler, size: int) -> Sequence[int]:
    rank, world = place()
    if (sampler.rank, sampler.num_replicas) != (rank, world):
        raise Incompatible(
            f"Expected a DistributedSampler for this process group, rank {rank} of {world}, got "
            f"rank {sampler.rank} of {sampler.num_replicas}. Call init_process_group first, then "
            "make the sampler, then guard.prepare."
        )
    return _first(sampler.dataset, size, "DistributedSampler")


def _refused(what: str, do: str) -> Incompatible:
    return Incompatible(
        "Expected a sampler that gives each record of a fixed set once (shuffle, "
        f"SubsetRandomSampler, DistributedSampler), got {what}. Poisson sampling takes its place: "
        f"{do}"
    )
