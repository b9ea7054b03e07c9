"""A Flower grid in one process, for tests: real messages, no network."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.common.serde import make_message, message_from_proto, message_to_proto
from flwr.serverapp import Grid

from vitguard.errors import expected

__all__ = ["InProcessGrid"]

App = Callable[[Message, Context], Message]


def _identify() -> None:
    """Say which task this is, where nobody has: a SuperLink does, and messages ask for it."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:  # older releases do not ask
        return
    for name in ("task_id", "run_id", "node_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, 1)


class InProcessGrid(Grid):
    """Runs client apps one after the other; every message crosses Flower's own protocol buffers.

    What a node keeps in `context.state` lasts, an exception becomes an Error reply, and replies of
    nodes in `late` are dropped, as a real grid does; nodes in `absent` are not there. An app runs
    when its reply is taken, so that no more than one reply is held.

    Args:
        apps: The client app of each node, by node id.
        record: Keep the bytes of all messages in `sent`, for tests that search them.
    """

    def __init__(self, apps: Mapping[int, App], *, record: bool = False) -> None:
        _identify()
        self.apps = dict(apps)
        self.contexts = {
            node: Context(
                1, node, {"partition-id": i, "num-partitions": len(apps)}, RecordDict(), {}
            )
            for i, node in enumerate(self.apps)
        }
        self.late: set[int] = set()
        self.absent: set[int] = set()
        self.sent: list[bytes] = []
        self._record = record
        self._numbers = itertools.count(1)

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """There is no information about the run."""
        raise expected("a grid of a deployment", "one in a process, which has no run")

    def get_node_ids(self) -> list[int]:
        """Return the nodes that are there."""
        return [n for n in self.apps if n not in self.absent]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message, as Flower's own constructor makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Refuse: messages are answered at once."""
        raise expected("send_and_receive", "push_messages")

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Refuse: messages are answered at once."""
        raise expected("send_and_receive", "pull_messages")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Return an iterator over the replies; each node answers when it comes to its turn."""
        replies = (self._answered(message) for message in list(messages))
        return (r for r in replies if r.metadata.src_node_id not in self.late)

    def _answered(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        number, now = str(next(self._numbers)), time.time()
        there = Metadata(1, number, 1, node, "", "", now, 3600.0, message.metadata.message_type)
        delivered = self._crossed(make_message(there, message.content))
        try:
            reply = self.apps[node](delivered, self.contexts[node])
        except Exception as error:  # noqa: BLE001 - as a node does
            reply = Message(Error(2, f"{type(error).__name__}"), reply_to=delivered)
        return self._crossed(reply)

    def _crossed(self, message: Message) -> Message:
        proto = message_to_proto(message)
        if self._record:
            self.sent.append(proto.SerializeToString())
        return message_from_proto(proto)
