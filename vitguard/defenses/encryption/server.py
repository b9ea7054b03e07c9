"""The server's side: check messages and add their ciphertexts. It holds nothing that decrypts."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

from vitguard.defenses.encryption.backend import shared_engine
from vitguard.defenses.encryption.keys import ServerKeys
from vitguard.defenses.encryption.manifest import Manifest
from vitguard.defenses.encryption.signing import SigningKey
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
    """Adds the encrypted messages of one round. Thread-safe.

    Guarantees:
        A message that is refused leaves the sum as it was.
        Each client is counted once, and no more clients than the sum can hold.
        Only the holder of `signing` can make a sum that clients open.

    Args:
        keys: What tells clients apart, from `KeySet.for_server`.
        manifest: What is encrypted.
        signing: The server's own key; clients know its `public_bytes`.
        round_id: Number of the round; messages of others are refused.
        base: Version of the public model that the messages must refer to.
    """

    def __init__(
        self,
        keys: ServerKeys,
        manifest: Manifest,
        *,
        signing: SigningKey,
        round_id: int,
        base: str = "",
    ) -> None:
        if not isinstance(keys, ServerKeys):
            raise expected("the server's keys, from KeySet.for_server", type(keys).__name__)
        if not isinstance(signing, SigningKey):
            raise expected("the server's SigningKey", type(signing).__name__)
        self._context = Context(keys, manifest, round_id, base)
        self._signing = signing
        self._engine = shared_engine(keys.layout)
        self._lock = threading.Lock()
        self._total: list[Any] = []
        self._weights: dict[str, float] = {}
        self._finished: bytes | None = None
        self._broken = False

    def __repr__(self) -> str:
        return f"Aggregator(round_id={self._context.round_id}, clients={len(self._weights)})"

    @property
    def clients(self) -> tuple[str, ...]:
        """Clients whose messages are in the sum."""
        return tuple(self._weights)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each client in the sum; public, and proved by the client's key."""
        return dict(self._weights)

    def add(self, data: bytes, *, sender: str | None = None, weight: float | None = None) -> None:
        """Check one client's message and add it.

        Args:
            sender: The client that the transport says it came from; another's is refused.
            weight: What the client claims beside the message, such as its number of examples; the
                message must hold the same.

        Raises:
            Rejected: The message does not hold, its client was counted already, the sum is full
                or finished.
        """
        header, ciphertexts = open_message(data, MESSAGE, self._context)
        if sender is not None and header.sender != sender:
            raise Rejected("sender", f"a message of {header.sender!r} from client {sender!r}")
        if weight is not None and weight != header.weight:
            raise Rejected("weight", f"a claimed weight of {weight}", f"{header.weight}, as sealed")
        with self._lock:
            self._check_open()
            if self._finished is not None:
                raise Rejected("replay", "a message after the sum was given out")
            if header.sender in self._weights:
                raise Rejected("replay", f"a second message of client {header.sender!r}")
            if len(self._weights) >= self._context.keys.max_clients:
                raise Rejected("clients", f"more than {self._context.keys.max_clients} clients")
            self._broken = True  # and left so by whatever breaks this off: Ctrl-C, a timeout
            refusal = self._included(ciphertexts)
            if refusal is None:
                self._weights[header.sender] = header.weight
            self._broken = False
        if refusal is not None:
            raise refusal

    def _included(self, ciphertexts: Sequence[memoryview]) -> Rejected | None:
        """Add all ciphertexts of a message, or none and return why."""
        total, added = self._total, 0
        try:
            if not total:
                self._total = [self._engine.load(part, seeded=True) for part in ciphertexts]
                return None
            for part in ciphertexts:
                self._engine.add(total[added], self._engine.load(part, seeded=True))
                added += 1
        except Rejected as refusal:  # of a ciphertext that was not added; those before it were
            self._take_back(ciphertexts[:added])
            return refusal
        return None

    def _take_back(self, added: Sequence[memoryview]) -> None:
        """Subtract what was added of a message; exact, since ciphertexts add modulo primes."""
        for total, part in zip(self._total, added, strict=False):
            self._engine.subtract(total, self._engine.load(part, seeded=True))

    def _check_open(self) -> None:
        if self._broken:
            raise Rejected("broken", "a sum whose last addition was broken off: start it afresh")

    def finish(self, *, min_clients: int = 2) -> bytes:
        """Return the encrypted sum for the clients; nothing can be added afterwards.

        Args:
            min_clients: The fewest messages that may be summed up, at least 2.

        Raises:
            Rejected: Fewer messages arrived.
        """
        if type(min_clients) is not int or min_clients < 2:
            raise expected("min_clients, a whole number of at least 2", repr(min_clients))
        with self._lock:
            self._check_open()
            if len(self._weights) < min_clients:
                raise Rejected(
                    "clients", f"{len(self._weights)} messages, fewer than {min_clients}"
                )
            if self._finished is None:
                weight = math.fsum(self._weights.values())
                header = Header(SUM, SERVER, len(self._weights), weight)
                ciphertexts = [self._engine.save(cipher) for cipher in self._total]
                self._finished = write_message(
                    header, ciphertexts, self._context, self._signing.sign
                )
                self._total.clear()
            return self._finished
