"""One masked round as the server sees it: who answered which phase, and what has been added."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from logging import WARNING

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from torch import Tensor

from vitguard.defenses.masking import MaskingServer
from vitguard.errors import Rejected, VitguardError
from vitguard.federated.flower.changes import moved, spelled
from vitguard.federated.flower.masked_client import (
    AGREEMENT,
    ANSWERS,
    ASKED,
    BODY,
    KEYS,
    PHASE,
    SHARES,
    VALUES,
)
from vitguard.federated.flower.records import ROUND, from_arrays
from vitguard.federated.flower.replies import PlainSum, Reply, content_of, in_one_line

__all__ = ["MaskedRound"]

Take = Callable[[int, bytes], object]


@dataclass
class MaskedRound:
    """Drives the phases of one round over a grid, and adds replies as they come.

    Args:
        server: The masked sum.
        grid: Where nodes are asked.
        said: The number and name of the round and the version of the model, for each message.
        start: Weights before the round.
        refused: Filled with a reason for each node that was left out.
        weighted_by: The metric that must be the signed weight.
        max_clipped: The most values of a client that were moved to their bound; None for any.
        timeout: Seconds for each phase but training.
    """

    server: MaskingServer
    grid: Grid
    said: Mapping[str, int | str | bytes]
    start: Mapping[str, Tensor]
    refused: dict[int, str]
    weighted_by: str
    max_clipped: int | None
    timeout: float
    names: dict[int, str] = field(default_factory=dict)  # clients that answered the last phase
    metrics: list[MetricRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        sealed = spelled(self.start, self.server.terms.manifest.names).values()
        self._plain = PlainSum(self.start, {*sealed, *self.server.terms.manifest.names})

    def begin(self, messages: Iterable[Message]) -> list[Message]:
        """Exchange keys and shares; return the messages of training for who took part in both.

        Raises:
            Rejected: Too few did.
        """
        training = {m.metadata.dst_node_id: m for m in messages}
        self._ask(KEYS, dict.fromkeys(training, b""), self._add_keys)
        roster = self.server.roster()
        self._ask(SHARES, dict.fromkeys(self.names, roster), self._add_shares)
        return [
            self._message(node, VALUES, self.server.inbox(name), training[node].content)
            for node, name in self.names.items()
        ]

    def add(self, replies: Iterable[Message]) -> None:
        """Add the masked values of each reply as it comes, or refuse it with its reason."""
        asked, self.names = self.names, {}
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                if node not in asked:
                    raise Rejected("client", "values of a node that was not asked")
                self._add_values(reply, asked[node])
                self._took(node)
                self.names[node] = asked[node]
            except VitguardError as refusal:
                self._refuse(node, in_one_line(refusal), answered=node in self.names)
            del reply  # its values go before the next ones come
        self._note_silent(VALUES, asked)

    def finish(self) -> dict[str, Tensor]:
        """Have the masks taken off the sum; return the weights after the round.

        Raises:
            Rejected: Too few agreed or answered, or shares are false.
        """
        server = self.server
        survivors = server.survivors()
        weight = math.fsum(server.weights.values())
        self._ask(
            AGREEMENT,
            dict.fromkeys(self.names, survivors),
            lambda node, body: server.add_agreement(body, sender=self.names[node]),
        )
        agreements = server.agreements()
        self._ask(
            ANSWERS,
            dict.fromkeys(self.names, agreements),
            lambda node, body: server.add_answer(body, sender=self.names[node]),
        )
        mean = server.mean()
        spelling = spelled(self.start, mean)
        changes = {**{spelling[n]: t for n, t in mean.items()}, **self._plain.mean(weight)}
        return {n: moved(t, changes[n]) if n in changes else t for n, t in self.start.items()}

    def _add_keys(self, node: int, body: bytes) -> None:
        self.names[node] = self.server.add_keys(body)

    def _add_shares(self, node: int, body: bytes) -> None:
        self.server.add_shares(body, sender=self.names[node])

    def _add_values(self, message: Message, name: str) -> None:
        reply = Reply.of(message, weighted_by=self.weighted_by, max_clipped=self.max_clipped)
        changes = from_arrays(reply.arrays)
        self._plain.check(changes)
        self.server.add_masked(reply.sealed, sender=name, weight=reply.weight)
        self._plain.add(changes, reply.weight)
        self.metrics.append(reply.metrics)

    def _ask(self, phase: str, bodies: Mapping[int, bytes], take: Take) -> None:
        """Send each node its message of a phase; keep in `names` those whose answer was taken."""
        messages = [self._message(node, phase, body) for node, body in bodies.items()]
        answered: set[int] = set()
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout):
            node = reply.metadata.src_node_id
            try:
                if node not in bodies:
                    raise Rejected("client", "an answer of a node that was not asked")
                take(node, _body(reply))
                self._took(node)
                answered.add(node)
            except VitguardError as refusal:
                self._refuse(node, in_one_line(refusal), answered=node in answered)
        self.names = {node: name for node, name in self.names.items() if node in answered}
        self._note_silent(phase, bodies)

    def _message(
        self, node: int, phase: str, body: bytes, content: RecordDict | None = None
    ) -> Message:
        asked = ConfigRecord({**self.said, PHASE: phase, BODY: body})
        records = RecordDict({**(content or {}), ASKED: asked})
        return Message(content=records, dst_node_id=node, message_type=MessageType.TRAIN)

    def _note_silent(self, phase: str, asked: Iterable[int]) -> None:
        for node in asked:
            if node not in self.names and node not in self.refused:
                self._refuse(node, f"no answer in the phase of {phase}")

    def _took(self, node: int) -> None:
        """Forget what else came from a node whose answer in this phase was taken."""
        self.refused.pop(node, None)  # those refused in an earlier phase are not asked

    def _refuse(self, node: int, reason: str, *, answered: bool = False) -> None:
        """Note why a node is left out; of one that has answered, such as twice, log it alone."""
        if not answered:
            self.refused.setdefault(node, reason)
        log(WARNING, "Round %s: node %s: %s", self.said[ROUND], node, reason)


def _body(reply: Message) -> bytes:
    found = [r.get(BODY) for r in content_of(reply).config_records.values()]
    if len(found) != 1 or not isinstance(found[0], bytes):
        raise Rejected("records", "an answer without a masking message", "one of ProtectMod")
    return found[0]
