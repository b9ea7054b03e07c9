"""Replies one at a time, as they arrive: a server that adds them holds one, not all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

__all__ = ["Around", "Arrivals"]


class Around(Grid):
    """A grid around another; what it sends and receives is for those who derive it."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Any) -> None:
        """Pass it on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Information about the run."""
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are there."""
        return self._grid.get_node_ids()

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Pass it on."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass it on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass it on."""
        return self._grid.pull_messages(message_ids)


class Arrivals(Around):
    """A grid around another, which hands out each reply as it comes and keeps none.

    Flower's own `send_and_receive` returns a list of all replies. This one asks for them one by
    one, in turns, until all have come or the time is over.

    Args:
        grid: Flower's grid.
        wait: Called when no reply was there in a whole turn.
    """

    def __init__(self, grid: Grid, *, wait: Callable[[], None] = lambda: time.sleep(1.0)) -> None:
        super().__init__(grid)
        self._wait = wait

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send every message now, and return an iterator over the replies as they arrive."""
        sent = [name for m in messages for name in self._grid.push_messages([m]) if name]
        return self._arriving(sent, None if timeout is None else time.monotonic() + timeout)

    def _arriving(self, waiting: list[str], end: float | None) -> Iterator[Message]:
        while waiting:
            before = len(waiting)
            for name in list(waiting):
                for reply in list(self._grid.pull_messages([name]))[:1]:  # one answers a message
                    waiting.remove(name)
                    yield reply
            if end is not None and time.monotonic() >= end:
                return
            if len(waiting) == before:
                self._wait()
