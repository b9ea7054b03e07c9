"""The server's side of one masked round: it relays, adds, and takes masks off the sum alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitguard.defenses.encryption.signing import SigningKey
from vitguard.defenses.masking import secret_sharing as sharing
from vitguard.defenses.masking import wire
from vitguard.defenses.masking.client import read_keys
from vitguard.defenses.masking.terms import Terms, check_terms
from vitguard.defenses.masking.values import average
from vitguard.errors import InputError, Rejected, expected

__all__ = ["MaskingServer"]

_PHASES = ("keys", "shares", "values", "agreement", "answers", "over")


class MaskingServer:
    """Adds the masked values of one round. Thread-safe.

    A phase is closed by asking for what the next one starts from: `roster`, `inbox`, `survivors`,
    `agreements`, `finish`. A client whose message is missing then is left out; one that is missing
    after its values arrived is still in the sum.

    Guarantees:
        A message that is refused leaves the sum as it was.
        Fewer clients than the threshold in a phase: one clear refusal and no sum.
        A false share changes no sum: a rebuilt seed is compared with what its client signed.

    Args:
        terms: What all parties agreed on.
        signing: The server's own key; its public half stands in the terms.
        round_id, base: Number of the round and version of the public model.
    """

    def __init__(self, terms: Terms, *, signing: SigningKey, round_id: int, base: str = "") -> None:
        sharing.require_masking()
        check_terms(terms)
        if not isinstance(signing, SigningKey):
            raise expected(
                "the server's own SigningKey", type(signing).__name__, "SigningKey.load reads one."
            )
        if signing.public_bytes() != terms.server:
            raise expected("the server's signing key that the terms name", "another")
        self.terms, self._signing = terms, signing
        self.round_id = round_id
        self._binding = terms.binding(round_id, base)
        self._phase = 0
        self._keys: dict[str, bytes] = {}
        self._shares: dict[str, dict[str, str]] = {}
        self._total = np.zeros(terms.manifest.values, np.uint32)
        self._weights: dict[str, float] = {}
        self._agreements: dict[str, bytes] = {}
        self._answers: dict[str, dict[str, dict[str, bytes]]] = {}
        self._opened: tuple[NDArray[np.uint32], dict[str, Tensor]] | None = None
        self._finished: bytes | None = None
        self.clipped: dict[str, int] = {}
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"MaskingServer(round_id={self.round_id}, phase={_PHASES[self._phase]!r})"

    @property
    def clients(self) -> tuple[str, ...]:
        """Clients whose values are in the sum."""
        return tuple(sorted(self._weights))

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each client in the sum."""
        return dict(self._weights)

    def add_keys(self, message: bytes) -> str:
        """Take a client's public keys; return its name.

        Raises:
            Rejected: The message does not hold, or is the client's second, or comes too late.
        """
        with self._lock:
            client, _ = self._open(message, wire.KEYS, 0, self.terms.clients, self._keys)
            read_keys(message, self.terms, self._binding, client)
            self._keys[client] = bytes(message)
            return client

    def roster(self) -> bytes:
        """Close the phase of keys; return the list of them for all clients in it."""
        with self._lock:
            self._close(0, self._keys)
            body = {c: m.hex() for c, m in self._keys.items()}
            return self._message(wire.ROSTER, json.dumps(body).encode())

    def add_shares(self, message: bytes, *, sender: str | None = None) -> None:
        """Take the encrypted shares of a client; raises as `add_keys` does.

        Args:
            sender: The client that the transport says it came from; another's is refused. So for
                all messages to come.
        """
        with self._lock:
            client, body = self._open(message, wire.SHARES, 1, self._keys, self._shares, sender)
            found = dict(wire.mapping(body))
            if found.keys() != self._keys.keys() - {client}:
                raise Rejected("client", "shares for others than the clients in the list of keys")
            for text in found.values():
                wire.hexadecimal(text, 48)
            self._shares[client] = found

    def inbox(self, client: str) -> bytes:
        """Close the phase of shares; return those that were made for one client."""
        with self._lock:
            self._close(1, self._shares)
            if not isinstance(client, str) or client not in self._shares:
                raise Rejected("client", f"{client!r:.80}, who made no shares")
            body = {c: found[client] for c, found in self._shares.items() if c != client}
            return self._message(wire.INBOX, json.dumps(body).encode())

    def add_masked(
        self, message: bytes, *, sender: str | None = None, weight: float | None = None
    ) -> None:
        """Add the masked values of a client; raises as `add_keys` does.

        Args:
            weight: What the client claims elsewhere, such as its number of examples; the signed
                weight must be the same.
        """
        with self._lock:
            client, body = self._open(message, wire.MASKED, 2, self._shares, self._weights, sender)
            if len(body) != wire.MASKED_HEAD.size + 4 * len(self._total):
                raise Rejected("counts", f"{len(body)} bytes of values where others were due")
            signed, clipped = wire.MASKED_HEAD.unpack_from(body)
            try:
                self.terms.check_weight(signed)
            except InputError as error:
                raise Rejected("weight", f"a weight of {signed}") from error
            if weight is not None and weight != signed:
                raise Rejected("weight", f"a claimed weight of {weight}", f"{signed}, as signed")
            if clipped > len(self._total):
                raise Rejected("counts", "more values clipped than there are")
            values = np.frombuffer(body, "<u4", offset=wire.MASKED_HEAD.size)
            self._weights[client], self.clipped[client] = signed, clipped
            np.add(self._total, values, out=self._total)

    def survivors(self) -> bytes:
        """Close the phase of values; return the set of clients whose values arrived."""
        with self._lock:
            self._close(2, self._weights)
            body = json.dumps({"survivors": list(self.clients)})
            return self._message(wire.SURVIVORS, body.encode())

    def add_agreement(self, message: bytes, *, sender: str | None = None) -> None:
        """Take a client's signature of the survivors; raises as `add_keys` does."""
        with self._lock:
            client, body = self._open(
                message, wire.AGREED, 3, self._weights, self._agreements, sender
            )
            roster = sharing.fingerprint([self._keys[c] for c in sorted(self._keys)])
            due = sharing.fingerprint([roster, *(c.encode() for c in self.clients)])
            if wire.hexadecimal(wire.mapping(body, {"set"})["set"], 32) != due:
                raise Rejected("survivors", "an agreement to another set of survivors")
            self._agreements[client] = bytes(message)

    def agreements(self) -> bytes:
        """Close the phase of agreement; return the signatures for all who gave one."""
        with self._lock:
            self._close(3, self._agreements)
            body = {c: m.hex() for c, m in self._agreements.items()}
            return self._message(wire.AGREEMENTS, json.dumps(body).encode())

    def add_answer(self, message: bytes, *, sender: str | None = None) -> None:
        """Take the shares that a client reveals; raises as `add_keys` does."""
        with self._lock:
            client, body = self._open(
                message, wire.ANSWER, 4, self._agreements, self._answers, sender
            )
            stated = wire.mapping(body, {"own", "pairs"})
            due = {"own": {*self._weights}, "pairs": self._shares.keys() - self._weights.keys()}
            read: dict[str, dict[str, bytes]] = {}
            for kind, whose in due.items():
                if not isinstance(stated[kind], dict) or not stated[kind].keys() <= whose:
                    raise Rejected("share", f"shares of others than were asked for ({kind})")
                read[kind] = {
                    c: wire.hexadecimal(text, sharing.SEED) for c, text in stated[kind].items()
                }
            self._answers[client] = read

    def finish(self) -> bytes:
        """Take the masks off the sum and return it, signed, for the clients.

        Raises:
            Rejected: Too few answered, shares are false, or a value is beyond the bounds.
        """
        with self._lock:
            if self._finished is None:
                total, _ = self._unmask()
                weight = sum(self._weights[c] for c in self.clients)
                head = wire.SUM_HEAD.pack(weight, len(self._weights))
                values = total.astype("<u4", copy=False).data.cast("B")
                self._finished = self._message(wire.SUM, (head, values))
            return self._finished

    def mean(self) -> dict[str, Tensor]:
        """Return the weighted average by name, which the server reads; raises as `finish` does."""
        with self._lock:
            return self._unmask()[1]

    def _unmask(self) -> tuple[NDArray[np.uint32], dict[str, Tensor]]:
        if self._opened is None:
            self._close(4, self._answers, stay=True)
            keys = {c: read_keys(m, self.terms, self._binding, c) for c, m in self._keys.items()}
            own = {c: self._seed(c, "own", keys[c]["own"]) for c in self.clients}
            gone = sorted(self._shares.keys() - self._weights.keys())
            lost = {c: self._seed(c, "pairs", keys[c]["pairs"]) for c in gone}
            total = self._total.copy()  # a refusal below leaves the sum as it was
            for seed in own.values():
                sharing.add_mask(total, sharing.self_key(seed, self._binding), -1)
            for client, seed in lost.items():
                for peer in self.clients:
                    key = sharing.pair_key(
                        seed, keys[peer]["pairs"], self._binding, "pairwise mask"
                    )
                    sharing.add_mask(total, key, -1 if peer < client else 1)
            weight = sum(self._weights[c] for c in self.clients)
            self._opened = total, average(total, self.terms, weight, len(self._weights))
            self._phase = 5
        return self._opened

    def _seed(self, client: str, kind: str, public: bytes):
        place = {c: n for n, c in enumerate(self.terms.clients, 1)}
        shares = {
            place[sender]: found[kind][client]
            for sender, found in self._answers.items()
            if client in found[kind]
        }
        make = sharing.commitment if kind == "own" else sharing.public_half
        return sharing.rebuild(shares, self.terms.threshold, public, self._binding, make)

    def _open(
        self,
        message: bytes,
        kind: int,
        phase: int,
        allowed: Collection[str],
        had: Collection[str],
        sender: str | None = None,
    ) -> tuple[str, bytes | memoryview]:
        client, body = wire.open_message(message, kind, self.terms, self._binding)
        if sender not in (None, client):
            raise Rejected("client", f"a message of {client!r} from client {sender!r}")
        if self._phase != phase:
            raise Rejected("phase", f"a message of {client!r} in the phase of {self._name}")
        if client not in allowed:
            raise Rejected("client", f"a message of {client!r}, who missed an earlier phase")
        if client in had:
            raise Rejected("replay", f"a second message of {client!r}")
        return client, body

    @property
    def _name(self) -> str:
        return _PHASES[self._phase]

    def _close(self, phase: int, found: Collection[str], *, stay: bool = False) -> None:
        if self._phase == phase + 1:  # closed before: the same answer again
            return
        if self._phase != phase:
            raise Rejected(
                "phase", f"one in the phase of {self._name}",
                f"a round in the phase of {_PHASES[phase]}",
            )  # fmt: skip
        if len(found) < self.terms.threshold:
            raise Rejected(
                "clients",
                f"{len(found)} of {len(self.terms.identities)} clients in the phase of "
                f"{self._name}, fewer than {self.terms.threshold}: there is no sum",
                "enough clients",
            )
        self._phase += not stay

    def _message(self, kind: int, body: bytes | tuple[bytes | memoryview, ...]) -> bytes:
        return wire.write_message(kind, wire.SERVER, body, self._binding, self._signing)
