"""Poisson batches: each example joins each batch independently; empty and large ones handled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset

from vitguard.defenses.privacy.training import PrivateTraining
from vitguard.errors import Incompatible, expected

__all__ = ["PoissonLoader"]


class _Collate:
    """Collate that turns an empty draw into one blank example, and says how many are real."""

    def __init__(self, collate: Callable[[list[Any]], Any], dataset: Any) -> None:
        self.collate = collate
        self.dataset = dataset

    def __call__(self, examples: list[Any]) -> tuple[int, Any]:
        if examples:
            return len(examples), self.collate(examples)
        blank = self.collate([self.dataset[0]])
        return 0, tree_map(lambda t: torch.zeros_like(t) if isinstance(t, Tensor) else t, blank)


class PoissonLoader:
    """A loader's Poisson-sampled stand-in: as many batches, of the same size on average.

    Args:
        loader: The loader to stand in for; its dataset must have a length.
        training: Told of each batch before it is handed out.
        generator: Source of the draws, which must stay secret.
        physical: Most examples at a time: a larger batch comes in pieces, and the optimizer steps
            after the last one.
    """

    def __init__(
        self,
        loader: DataLoader,
        training: PrivateTraining,
        generator: torch.Generator,
        physical: int | None = None,
    ) -> None:
        from opacus.utils.uniform_sampler import (
            DistributedUniformWithReplacementSampler,
            UniformWithReplacementSampler,
        )

        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise Incompatible(
                f"Expected a DataLoader over a dataset with a length, got {type(loader).__name__}: "
                "Poisson sampling draws every example independently."
            )
        if not len(loader):
            raise expected("a loader with at least one batch", 0)
        self.training, self.physical = training, physical
        self.ends_step = True
        """Whether the optimizer's step on the batch handed out last is a full step."""
        self.dataset = loader.dataset
        self.rate = 1 / len(loader)
        size = len(loader.dataset)  # type: ignore[arg-type]
        world = _world_size()
        self.expected_batch_size = size * self.rate / world
        if world > 1:
            sampler: Any = DistributedUniformWithReplacementSampler(
                total_size=size, sample_rate=self.rate, generator=generator
            )
        else:
            sampler = UniformWithReplacementSampler(
                num_samples=size, sample_rate=self.rate, generator=generator, steps=len(loader)
            )
        self.batch_sampler = sampler
        self._loader = DataLoader(
            loader.dataset,
            batch_sampler=sampler,
            num_workers=loader.num_workers,
            collate_fn=_Collate(loader.collate_fn, loader.dataset),
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        for real, batch in self._loader:
            size = max(real, 1)
            step = min(self.physical or size, size)
            starts = range(0, size, step)
            key = int(torch.randint(2**62, (), generator=self.batch_sampler.generator))
            for start in starts:
                stop = min(start + step, size)
                self.ends_step = stop == size
                self.training.announce(
                    stop - start,
                    min(real, stop) - start,
                    last=self.ends_step,
                    key=key if len(starts) > 1 else None,
                )
                yield batch if len(starts) == 1 else _cut(batch, start, stop, size)


def _cut(batch: Any, start: int, stop: int, size: int) -> Any:
    if any(len(t) != size for t in tree_leaves(batch) if isinstance(t, Tensor)):
        raise expected("a batch of tensors with a row for each example", "another shape")
    return tree_map(lambda t: t[start:stop] if isinstance(t, Tensor) else t, batch)


def _world_size() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1
