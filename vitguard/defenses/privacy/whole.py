"""Poisson batches handed out whole, for trainers that count every batch as a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vitguard.defenses.privacy.loader import PoissonLoader
from vitguard.errors import Unprotected

__all__ = ["WholeBatches"]


class WholeBatches:
    """The batches of a Poisson loader, each in one: `pieces` cuts it to fit the memory.

    A trainer that counts a batch as a step would take the pieces of one batch for several steps.

    Args:
        loader: From `guard.prepare`.
        physical: Most examples at a time; by default what `loader` was made with.
    """

    def __init__(self, loader: PoissonLoader, physical: int | None = None) -> None:
        self.loader = loader
        self.physical = physical or loader.physical
        self.dataset = loader.dataset
        self.batch_size = max(1, round(loader.expected_batch_size))
        """Examples in a batch, on average."""
        self._real: int | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = self.loader.drawn()
        while True:
            batches.take_turn()
            try:
                self._real, batch = batches.draw()
            except StopIteration:
                return
            batches.announce_whole(self._real)
            yield batch

    def pieces(self, batch: Any) -> Iterator[tuple[Any, float, bool]]:
        """Yield each piece of the batch handed out last, its share of it, and whether it is last.

        Step the private optimizer after each piece.

        Args:
            batch: As it was handed out, or moved to a device.
        """
        if self._real is None:
            raise Unprotected("Expected a batch of the private loader, got none. Iterate over it.")
        real, self._real = self._real, None
        size = max(real, 1)
        for settings, part in self.loader.cut(real, batch, self.physical):
            yield self.loader.announced(part, settings), settings["size"] / size, settings["last"]
