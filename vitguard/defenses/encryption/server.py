"""The server's side: check messages and add their ciphertexts. It holds nothing that decrypts."""

from __future__ import annotations

import math
from typing import Any

from vitguard.defenses.encryption.backend import shared_engine
from vitguard.defenses.encryption.keys import ServerKeys
from vitguard.defenses.encryption.manifest import Manifest
from vitguard.defenses.encryption.wire import (
    MESSAGE,
    SERVER,
    SUM,
    Context,
    Header,
    open_message,
    write_message,
)
from vitguard.errors import Rejected, expected

__all__ = ["Aggregator"]


class Aggregator:
    """Adds the encrypted messages of one round.

    Guarantees:
        A message that is refused leaves the sum as it was.
        Each client is counted once, and no more clients than the sum can hold.

    Args:
        public: What `KeySet.public_bytes` gave, or the `ServerKeys` read from it.
        manifest: What is encrypted.
        round_id: Number of the round; messages of others are refused.
        base: Version of the public model that the messages must refer to.
    """

    def __init__(
        self, public: bytes | ServerKeys, manifest: Manifest, *, round_id: int, base: str = ""
    ) -> None:
        keys = public if isinstance(public, ServerKeys) else ServerKeys.load(public)
        self._context = Context(keys, manifest, round_id, base)
        self._engine = shared_engine(keys.layout)
        self._total: list[Any] = []
        self._weights: dict[str, float] = {}
        self._finished: bytes | None = None

    def __repr__(self) -> str:
        return f"Aggregator(round_id={self._context.round_id}, clients={len(self._weights)})"

    @property
    def clients(self) -> tuple[str, ...]:
        """Clients whose messages are in the sum."""
        return tuple(self._weights)

    def add(self, data: bytes) -> None:
        """Check one client's message and add it.

        Raises:
            Rejected: The message does not hold, its client was counted already, the sum is full
                or finished.
        """
        if self._finished is not None:
            raise Rejected("replay", "a message after the sum was given out")
        header, ciphertexts = open_message(data, MESSAGE, self._context)
        if header.sender in self._weights:
            raise Rejected("replay", f"a second message of client {header.sender!r}")
        if len(self._weights) >= self._context.keys.max_clients:
            raise Rejected("clients", f"more than {self._context.keys.max_clients} clients")
        done: list[memoryview] = []
        first = not self._total
        try:
            for number, part in enumerate(ciphertexts):
                cipher = self._engine.load(part)
                if first:
                    self._total.append(cipher)
                else:
                    self._engine.add(self._total[number], cipher)
                    done.append(part)
        except BaseException:
            self._undo(first, done)
            raise
        self._weights[header.sender] = header.weight

    def _undo(self, first: bool, done: list[memoryview]) -> None:
        """Take back what was added of a message; exact, since ciphertexts add modulo primes."""
        if first:
            self._total.clear()
        for number, data in enumerate(done):
            self._engine.subtract(self._total[number], self._engine.load(data))

    def finish(self, *, min_clients: int = 2) -> bytes:
        """Return the encrypted sum for the clients; nothing can be added afterwards.

        Args:
            min_clients: The fewest messages that may be summed up, at least 2.

        Raises:
            Rejected: Fewer messages arrived.
        """
        if min_clients < 2:
            raise expected("min_clients of at least 2", min_clients)
        if len(self._weights) < min_clients:
            raise Rejected("clients", f"{len(self._weights)} messages, fewer than {min_clients}")
        if self._finished is None:
            weight = math.fsum(self._weights.values())
            header = Header(SUM, SERVER, len(self._weights), weight)
            ciphertexts = [self._engine.save(cipher) for cipher in self._total]
            self._finished = write_message(header, ciphertexts, self._context)
            self._total.clear()
        return self._finished
