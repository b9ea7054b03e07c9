"""Poisson batches: each example joins each batch independently; empty and large ones handled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vitguard.defenses.base import Draws
from vitguard.defenses.privacy.holders import change_tensors, tensors_of
from vitguard.defenses.privacy.mixing import reads_batches
from vitguard.defenses.privacy.samplers import PoissonSampler, place, records_of, refuse_change
from vitguard.defenses.privacy.training import Due, PrivateTraining
from vitguard.errors import expected

__all__ = ["PoissonLoader"]


class _Collate:
    """Collate that turns an empty draw into one blank example, and says how many are real."""

    def __init__(self, collate: Callable[[list[Any]], Any], dataset: Any, like: int) -> None:
        self.collate = collate
        self.dataset = dataset
        self.like = like

    def __call__(self, examples: list[Any]) -> tuple[int, Any]:
        if examples:
            return len(examples), self.collate(examples)
        blank = self.collate([self.dataset[self.like]])
        return 0, change_tensors(torch.zeros_like, blank)


class _Records(Dataset[Any]):
    """A data set that reads batches, and is never asked for an empty one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        return self.dataset.__getitems__(indices) if indices else []

    def __getattr__(self, name: str) -> Any:  # for `worker_init_fn`, which finds it in its worker
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


class PoissonLoader:
    """A loader's Poisson-sampled stand-in: as many batches, of the same size on average.

    Every batch must be stepped on before the next is taken, or left out by `skip`. A new iterator
    starts clean and ends the one before.

    Args:
        loader: The loader to stand in for. Its records and number of batches are kept, so the
            sampling rate is 1 / len(loader), also with `drop_last`; its workers, collate function
            and other settings too. Where its sampler gives a subset, the draws are from that.
        training: Told of each batch before it is handed out.
        draws: Source of the draws.
        physical: Most examples at a time: a larger batch comes in pieces, and the optimizer steps
            after the last one.

    Raises:
        Incompatible: Poisson draws cannot stand for what the loader does.
    """

    def __init__(
        self,
        loader: DataLoader,
        training: PrivateTraining,
        draws: Draws,
        physical: int | None = None,
    ) -> None:
        records = records_of(loader)
        rank, world = place()
        self.source = loader
        self.training, self.physical, self.draws = training, physical, draws
        self.ends_step = True
        """Whether the optimizer's step on the batch handed out last is a full step."""
        self.dataset = loader.dataset
        self.drawn_from = records
        self.first = records[0]
        self.records = len(records)
        """How many records may be drawn, over all processes."""
        self.rate = 1 / len(loader)
        self.expected_batch_size = self.records * self.rate / world
        self.batch_sampler = self.sampler = PoissonSampler(
            records, self.rate, len(loader), draws, rank=rank, world=world
        )
        kept = ("in_order", "pin_memory_device")  # newer than the oldest torch
        self._loader = DataLoader(
            _Records(loader.dataset) if reads_batches(loader.dataset) else loader.dataset,
            batch_sampler=self.batch_sampler,
            num_workers=loader.num_workers,
            collate_fn=_Collate(loader.collate_fn, loader.dataset, self.first),
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            **{name: getattr(loader, name) for name in kept if hasattr(loader, name)},
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if "_loader" in self.__dict__ and name != "ends_step":
            raise refuse_change(f"{name} of a loader")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"The private loader has no {name}: use it as it is, with physical_batch for memory. "
            "The loader that it stands in for is its `source`."
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        return self.drawn()

    def drawn(self) -> _Batches:
        """Start a new pass."""
        return _Batches(self)

    def announced(self, batch: Any, settings: dict[str, Any]) -> Any:
        """Return a piece as the training pass will know it: the one that comes next."""
        return _mark(batch, self.training.announce(**settings))

    def cut(
        self, real: int, batch: Any, physical: int | None
    ) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield the pieces of a batch, each with what to announce.

        Args:
            real: How many of the examples count; the batch holds a blank one where none does.
            physical: Most examples in a piece.
        """
        size = max(real, 1)
        step = min(physical or size, size)
        starts = range(0, size, step)
        key = self.draws.key()
        for piece, start in enumerate(starts):
            stop = min(start + step, size)
            settings = {
                "size": stop - start,
                "real": min(real, stop) - start,
                "piece": piece,
                "last": stop == size,
                "rate": self.rate,
                "key": key if len(starts) > 1 else None,
            }
            yield settings, batch if len(starts) == 1 else _rows(batch, start, stop, size)

    def one(self) -> Any:
        """Return a batch of the first record, to see what batches look like."""
        return self.source.collate_fn([self.dataset[self.first]])

    def skip(self) -> None:
        """Leave the batch handed out last out of training, with the pieces of it still to come.

        Nothing of it is released or counted. To choose by what is in it tells of the records; no
        ledger knows that.
        """
        self.training.drop()


class _Batches:
    """One pass over a Poisson loader."""

    def __init__(self, loader: PoissonLoader) -> None:
        self._loader = loader
        self._batches = iter(loader._loader)
        self._pieces: Iterator[Any] = iter(())
        loader.training.open(self)

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        loader = self._loader
        self.take_turn()
        piece = None if loader.training.skipped else next(self._pieces, None)
        if piece is None:
            self._pieces = loader.cut(*self.draw(), loader.physical)
            piece = next(self._pieces)
        settings, batch = piece
        loader.ends_step = settings["last"]
        return loader.announced(batch, settings)

    def take_turn(self) -> None:
        """Raise Unprotected unless the next batch may be handed out now."""
        self._loader.training.turn(self)

    def draw(self) -> tuple[int, Any]:
        """Return the next batch and how many of its examples are real."""
        return next(self._batches)

    def announce_whole(self, real: int) -> None:
        """Say that a whole batch was handed out; its pieces are announced one by one."""
        self._loader.training.announce(max(real, 1), real, rate=self._loader.rate)


def _rows(batch: Any, start: int, stop: int, size: int) -> Any:
    rows = [t.shape[:1] for t in tensors_of(batch)]
    if not rows or any(r != (size,) for r in rows):
        got = f"tensors of {', '.join(str(len(r) and r[0]) for r in rows)}" if rows else "no tensor"
        raise expected(
            f"a batch of {size} examples whose tensors have a row for each, to cut it in pieces",
            f"{got} in a {type(batch).__name__}",
            "Let the collate function return a dictionary, tuple or list of such tensors.",
        )  # fmt: skip
    return change_tensors(lambda t: t[start:stop], batch)


def _mark(batch: Any, due: Due) -> Any:
    """Note on the tensors themselves which batch they are of; a copy of them is not known."""
    for tensor in tensors_of(batch):
        tensor._vitguard_batch = due  # type: ignore[attr-defined]
    return batch
