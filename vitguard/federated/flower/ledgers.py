"""What a server knows of clients' privacy ledgers: that they only ever grow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from logging import WARNING

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.logger import log
from flwr.common.serde import make_message
from flwr.serverapp import Grid

from vitguard.errors import InputError, Rejected, expected
from vitguard.federated.flower.arrivals import Around
from vitguard.files import parsed_json

__all__ = ["LEDGER", "LedgerGrid", "Ledgers", "without_ledgers"]

LEDGER = "vitguard.ledger"
"""Name of the ConfigRecord with a ledger's name and the releases it has counted."""
_REFUSED = 202  # code of an Error reply, among those that Flower leaves to users


@dataclass
class Ledgers:
    """The most releases that each ledger has told, and which ledger each node has.

    Guarantees:
        A ledger that comes back with no more releases than before is refused: it was set back, or
        two nodes go on from one copy. So is a node that comes with another ledger, or with none.
        A ledger that two nodes were seen to go on from is refused from then on: what it counts is
        less than what was released.

    Does not protect against:
        A state that was set back and forward again before the server saw it, and a client that
        says what it likes.
    """

    most: dict[str, int] = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)

    def known(self, node: int) -> ConfigRecord | None:
        """Return what a node is reminded of, None where nothing is known."""
        name = self.nodes.get(node)
        return None if name is None else ConfigRecord({"name": name, "releases": self.most[name]})

    def count(self, node: int, told: ConfigRecord | None) -> None:
        """Take what a node's reply tells.

        Raises:
            Rejected: It is not what a ledger that only grows can tell.
        """
        before = self.nodes.get(node)
        if told is None:
            if before is not None:
                raise Rejected("ledger", "no ledger from a node that had one", "its ledger")
            return
        name, releases = told.get("name"), told.get("releases")
        if not isinstance(name, str) or not 0 < len(name) <= 64 or type(releases) is not int:
            raise Rejected("ledger", "another record than a name and a number", "a ledger")
        if before not in (None, name):
            raise Rejected("ledger", "another ledger than the node had before", "its own")
        if name in self.copied:
            raise Rejected("ledger", "one that two nodes went on from", "a ledger of one node")
        most = self.most.get(name, 0)
        if releases <= most:
            if any(own == name for other, own in self.nodes.items() if other != node):
                self.copied.append(name)
            raise Rejected(
                "ledger", f"release {releases} after release {most}: a state that was "
                "set back or copied", "a ledger that grew",
            )  # fmt: skip
        self.nodes[node], self.most[name] = name, releases

    def reminding(self, message: Message) -> Message:
        """Return a message that reminds its node of its ledger."""
        about = message.metadata
        known = self.known(about.dst_node_id)
        if known is None:
            return message
        return Message(
            RecordDict({**message.content, LEDGER: known}),
            about.dst_node_id,
            about.message_type,
            ttl=about.ttl,
            group_id=about.group_id,
        )

    def counted(self, reply: Message) -> Message:
        """Return a reply whose ledger grew, or an Error reply in place of another."""
        about = reply.metadata
        if reply.has_error():
            return reply
        told = reply.content.config_records.get(LEDGER)
        if told is None and not reply.content.array_records:  # no update, such as an evaluation
            return reply
        try:
            self.count(about.src_node_id, told)
        except Rejected as refusal:
            said = str(refusal)
            log(WARNING, "Node %s refused: %s", about.src_node_id, said)
            return make_message(about, error=Error(_REFUSED, said))
        return reply

    def to_json(self) -> str:
        """Return it as JSON, for a server that restarts."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Ledgers:
        """Read what `to_json` wrote.

        Raises:
            InputError: It is something else.
        """
        try:
            stored = parsed_json(text)
            if stored.keys() != {"most", "nodes", "copied"}:
                raise KeyError("fields")
            most, copied = dict(stored["most"].items()), stored["copied"]
            nodes = {int(n): name for n, name in stored["nodes"].items()}
            if [str(n) for n in nodes] != list(stored["nodes"]):
                raise ValueError("nodes")
            if any(type(r) is not int or r < 0 for r in most.values()) or type(copied) is not list:
                raise TypeError("counts")
            if not {*nodes.values(), *copied} <= most.keys():
                raise KeyError("a ledger that was never counted")
            return Ledgers(most, nodes, copied)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise expected("ledgers as JSON", type(error).__name__) from error


class LedgerGrid(Around):
    """A grid around another, under which clients and server agree on how much was released.

    Each node is reminded of the most releases that its ledger has told; a client that knows of
    fewer refuses before it trains. A reply whose ledger did not grow becomes an Error reply, which
    every strategy leaves out. `EncryptedFedAvg` works under one by itself; give it to another
    strategy as `strategy.start(LedgerGrid(grid), ...)`.

    Args:
        grid: Flower's grid.
        ledgers: What is known; save `ledgers.to_json()` for a server that restarts.

    Raises:
        InputError: A LedgerGrid is inside.
    """

    def __init__(self, grid: Grid, ledgers: Ledgers | None = None) -> None:
        inner: Grid = grid
        while isinstance(inner, Around):
            if isinstance(inner, LedgerGrid):
                raise expected(
                    "one LedgerGrid", "one around another",
                    "Each reply would be counted twice: leave one of them out.",
                )  # fmt: skip
            inner = inner._grid
        super().__init__(grid)
        self.ledgers = Ledgers() if ledgers is None else ledgers

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Remind nodes, and pass on what they reply."""
        reminded = [self.ledgers.reminding(m) for m in messages]
        return map(self.ledgers.counted, self._grid.send_and_receive(reminded, timeout=timeout))


def without_ledgers(grid: Grid, own: Ledgers) -> tuple[Grid, Ledgers]:
    """Return the grid inside a `LedgerGrid` and its ledgers; another as it is, with `own`.

    For a strategy that counts by itself: what a caller knows of ledgers must not be lost.
    """
    return (grid._grid, grid.ledgers) if isinstance(grid, LedgerGrid) else (grid, own)
