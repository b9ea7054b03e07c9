"""The client's side of one masked round: a state machine that answers each question once."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NoReturn, SupportsFloat, SupportsIndex

from torch import Tensor

from vitguard import rounds
from vitguard.core import Update, tensors_by_name
from vitguard.defenses.encryption.authority import check_id
from vitguard.defenses.encryption.secret import Secret
from vitguard.defenses.encryption.signing import SigningKey
from vitguard.defenses.masking import secret_sharing as sharing
from vitguard.defenses.masking import wire
from vitguard.defenses.masking.journal import Journal
from vitguard.defenses.masking.resting import RoundState, read_state, write_state
from vitguard.defenses.masking.terms import Terms, check_terms
from vitguard.defenses.masking.values import integers
from vitguard.draws import Draws
from vitguard.errors import Rejected, Unprotected, expected
from vitguard.numbers import plain_number

__all__ = ["MaskingClient", "read_keys"]

_PHASES = ("keys", "shares", "values", "agreement", "answer", "over")  # as a state names them


class MaskingClient:
    """One client of a masked run: keys, shares, masked values, agreement, answer.

    Guarantees:
        One message of each phase and round leaves it, and rounds only go forward.
        It answers for one set of survivors, of at least the threshold, that as many have signed.
        Of each peer it reveals the share of one seed, never of both.
        Keys that the peer's identity did not sign are refused.

    Does not protect against:
        A server that knows the secret identity keys, or chose the public ones in the terms.
        The sum itself, which the server reads.

    Args:
        terms: What all parties agreed on.
        identity: This client's own signing key; its public half stands in the terms.
        client_id: Name of this client.
        last: The last round that was started before, `last` of an earlier client, saved; -1 for
            none. Save it as soon as `start_round` returned.
        outliers: What becomes of NaN, infinity and values beyond their bound: `refuse` raises,
            `clip` moves them to the bound (NaN to zero) and counts them in `clipped`.
        journal: Where each answer is marked before it leaves; for a client whose state rests
            between two messages, since several processes may go on from one state.
    """

    def __init__(
        self,
        terms: Terms,
        identity: SigningKey,
        *,
        client_id: str,
        last: int = -1,
        outliers: Literal["refuse", "clip"] = "refuse",
        journal: Journal | None = None,
    ) -> None:
        sharing.require_masking()
        if outliers not in ("refuse", "clip"):
            raise expected("outliers 'refuse' or 'clip'", repr(outliers)[:80])
        if type(last) is not int or last < -1:
            raise expected("the number of the last round started, or -1", repr(last)[:80])
        check_terms(terms)
        check_id(client_id)
        if not isinstance(identity, SigningKey):
            raise expected(
                "the client's own SigningKey", type(identity).__name__, "SigningKey.load reads one."
            )
        if journal is not None and not isinstance(journal, Journal):
            raise expected("a Journal", type(journal).__name__, "Give Journal(path).")
        if terms.identities.get(client_id) != identity.public_bytes():
            raise expected(f"the identity key of {client_id!r:.80} in the terms", "another")
        self.terms, self.client_id = terms, client_id
        self.outliers: Literal["refuse", "clip"] = outliers
        self.clipped: dict[str, int] = {}
        self._identity, self._last, self._journal = identity, last, journal
        self._round: RoundState | None = None
        self._joined = False  # this very object was in the round `last`
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"MaskingClient({self.client_id!r}, {len(self.terms.identities)} clients)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a masking client holds keys and is not pickled: make it anew")

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskingClient:
        return self

    @property
    def last(self) -> int:
        """The last round that was started, -1 for none."""
        return self._last

    def state_bytes(self) -> bytes:
        """Return the last round and the one that is open, under a key of this client's identity.

        For a client whose process ends between two messages. Whoever puts an old one back has the
        client answer twice: keep it where only the client writes.
        """
        with self._lock:
            return write_state(self._last, self._round, *self._resting())

    def load_state_bytes(self, data: bytes) -> None:
        """Go on from what `state_bytes` returned.

        Raises:
            Rejected: It was changed, is of another client or other terms, or of an earlier round,
                or of an earlier phase than this very client has come to in that round.
        """
        with self._lock:
            last, now = read_state(data, *self._resting())
            if last < self._last:
                raise Rejected("replay", f"the state of round {last} after round {self._last}")
            if last == self._last and self._joined:
                found, here = _phase(now), _phase(self._round)
                if _PHASES.index(found) < _PHASES.index(here):
                    raise Rejected(
                        "replay", f"a state of the phase of {found} after that of {here}"
                    )
            self._last, self._round, self._joined = last, now, True

    def _resting(self) -> tuple[Secret[bytes], bytes]:
        about = self.terms.binding(0, "state of " + self.client_id)
        return self._identity.derived(b"vitguard masks, state"), about

    def start_round(
        self, round_id: SupportsIndex, *, weight: SupportsFloat | None = 1.0, base: str = ""
    ) -> bytes:
        """Start a round and return this client's public keys for it.

        Args:
            weight: None if it is known later: `Guard.round` then names it when values are made.

        Raises:
            Rejected: The round, or a later one, was started before.
            InputError: The weight is not one that the manifest allows.
        """
        number = plain_number(round_id)
        with self._lock:
            binding = self.terms.binding(number, base)
            weight = None if weight is None else self.terms.check_weight(weight)
            if number <= self._last:
                raise Rejected("replay", f"round {number} after round {self._last}")
            begun = None if self._journal is None else self._journal.begin()
            now = RoundState(binding, weight, _seed(), _seed(), _seed(), begun=begun)
            self._last, self._round, self._joined = number, now, True
            body = {
                "transport": sharing.public_half(now.transport, binding).hex(),
                "pairs": sharing.public_half(now.pairs, binding).hex(),
                "own": sharing.commitment(now.own, binding).hex(),
            }
            now.keys = self._message(wire.KEYS, json.dumps(body).encode())
            return now.keys

    def share_keys(self, roster: bytes) -> bytes:
        """Take the list of keys and return the encrypted shares of this client's two seeds.

        Raises:
            Rejected: A key was not signed by its client, is there twice, or too few are there.
        """
        with self._lock:
            now = self._at("keys")
            _, body = wire.open_message(roster, wire.ROSTER, self.terms, now.binding)
            found = {client: wire.hexadecimal(text) for client, text in wire.mapping(body).items()}
            self._check_enough(found)
            if found.get(self.client_id) != now.keys:
                raise Rejected("key", f"a list with other keys of {self.client_id!r}, or none")
            peers = {c: read_keys(m, self.terms, now.binding, c) for c, m in found.items()}
            for kind in ("transport", "pairs"):
                if len({keys[kind] for keys in peers.values()}) < len(peers):
                    raise Rejected("key", "a list with one key of two clients")
            count, least = len(self.terms.clients), self.terms.threshold
            halves = zip(
                sharing.split(now.own, least, count),
                sharing.split(now.pairs, least, count),
                strict=True,
            )
            shares = {
                client: Secret(own.reveal() + pair.reveal())
                for client, (own, pair) in zip(self.terms.clients, halves, strict=True)
            }
            sealed = {
                peer: sharing.seal_share(
                    self._transport(now, peers[peer], self.client_id, peer),
                    shares[peer],
                    self._about(now, self.client_id, peer),
                ).hex()
                for peer in peers
                if peer != self.client_id
            }
            self._mark(now, "shares")
            message = self._message(wire.SHARES, json.dumps(sealed).encode())
            now.roster, now.kept = peers, shares[self.client_id]
            now.roster_digest = sharing.fingerprint([found[c] for c in sorted(found)])
            now.phase = "shares"
            return message

    def take_shares(self, inbox: bytes) -> None:
        """Take the shares that others made for this client; who made some is masked with.

        Raises:
            Rejected: Too few are there, or one of a client whose keys were not in the list.
        """
        with self._lock:
            now = self._at("shares")
            _, body = wire.open_message(inbox, wire.INBOX, self.terms, now.binding)
            found = {c: wire.hexadecimal(text, 48) for c, text in wire.mapping(body).items()}
            if self.client_id in found or not found.keys() <= now.roster.keys():
                raise Rejected("client", "shares of a client that is not in the list of keys")
            self._check_enough({self.client_id, *found})
            now.inbox, now.phase = found, "values"

    def mask(self, update: Update | Mapping[str, Tensor]) -> bytes:
        """Return the masked values of this round, 4 bytes each.

        Raises:
            Unprotected: No round is at the phase of values.
            Rejected: The tensors are not those of the manifest.
            InputError: A value is not finite or beyond its bound, and `outliers` is `refuse`.
        """
        with self._lock:
            now = self._round
            if now is None or now.phase != "values":
                raise Unprotected(
                    "Expected a masking round that has its shares and sent no values, got "
                    f"{'none' if now is None else f'one at the phase of {now.phase}'}. Call "
                    "start_round, share_keys and take_shares first; values leave once a round."
                )
            weight = self._weight(now)
            tensors = update.tensors if isinstance(update, Update) else tensors_by_name(update)
            masked, self.clipped = integers(
                tensors, self.terms, weight, outliers=self.outliers, draws=Draws()
            )
            now.phase = "agreement"  # before anything can break off: values leave once
            self._mark(now, "values")
            sharing.add_mask(masked, sharing.self_key(now.own, now.binding), 1)
            for peer in now.inbox:
                key = sharing.pair_key(
                    now.pairs, now.roster[peer]["pairs"], now.binding, "pairwise mask"
                )
                sharing.add_mask(masked, key, 1 if self.client_id < peer else -1)
            head = wire.MASKED_HEAD.pack(weight, sum(self.clipped.values()))
            values = masked.astype("<u4", copy=False).data.cast("B")
            return self._message(wire.MASKED, (head, values))

    def seal(self, update: Update) -> Update:
        """Return the update with the manifest's tensors sealed and the message as its payload."""
        message = self.mask(update)
        sealed = update.seal(dict.fromkeys(self.terms.manifest.names, "masked, in a sum only"))
        return replace(
            sealed,
            payloads={**sealed.payloads, "masking": message},
            clipped={**sealed.clipped, **self.clipped},
        )

    def agree(self, survivors: bytes) -> bytes:
        """Sign the set of clients whose values arrived; once a round.

        Raises:
            Rejected: It is too small, lacks this client, or has one that is not masked with.
        """
        with self._lock:
            now = self._at("agreement")
            _, body = wire.open_message(survivors, wire.SURVIVORS, self.terms, now.binding)
            names = wire.mapping(body, {"survivors"})["survivors"]
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise Rejected("body", "survivors that are no list of names")
            if len(set(names)) < len(names):
                raise Rejected("body", "a survivor twice")
            self._check_enough(names)
            if self.client_id not in names or not {*names} <= {self.client_id, *now.inbox}:
                raise Rejected("client", "survivors without this client, or with a stranger")
            self._mark(now, "agreement")
            now.survivors, now.phase = tuple(sorted(names)), "answer"
            return self._message(wire.AGREED, json.dumps({"set": self._set(now).hex()}).encode())

    def answer(self, agreements: bytes) -> bytes:
        """Reveal one share for each peer, once at least the threshold signed the same survivors.

        Raises:
            Rejected: Fewer signed, or somebody signed another set.
        """
        with self._lock:
            now = self._at("answer")
            _, body = wire.open_message(agreements, wire.AGREEMENTS, self.terms, now.binding)
            found = wire.mapping(body)
            self._check_enough(found)
            for client, text in found.items():
                sender, inner = wire.open_message(
                    wire.hexadecimal(text), wire.AGREED, self.terms, now.binding
                )
                if sender != client or client not in now.survivors:
                    raise Rejected("client", "an agreement of a client that is no survivor")
                if wire.hexadecimal(wire.mapping(inner, {"set"})["set"], 32) != self._set(now):
                    raise Rejected("survivors", f"another set of survivors, which {client} signed")
            self._mark(now, "answers")
            now.phase = "over"
            revealed: dict[str, dict[str, str]] = {"own": {}, "pairs": {}}
            for peer in sorted({self.client_id, *now.inbox}):
                share = self._share_of(now, peer)
                if share is None:  # a peer that sent something else; others may have true ones
                    continue
                if peer in now.survivors:
                    revealed["own"][peer] = share.reveal()[: sharing.SEED].hex()
                else:
                    revealed["pairs"][peer] = share.reveal()[sharing.SEED :].hex()
            message = self._message(wire.ANSWER, json.dumps(revealed).encode())
            self._round = None
            return message

    def _share_of(self, now: RoundState, peer: str) -> Secret[bytes] | None:
        if peer == self.client_id:
            return now.kept
        try:
            return sharing.open_share(
                self._transport(now, now.roster[peer], peer, self.client_id),
                now.inbox[peer],
                self._about(now, peer, self.client_id),
            )
        except Rejected:
            return None

    def _weight(self, now: RoundState) -> float:
        """Return the weight of the values; `Guard.round` must not name another round or weight."""
        stated, weight = rounds.current(), now.weight
        if stated is None and weight is None:
            raise Unprotected("Expected a weight of start_round or Guard.round, got none.")
        if stated is not None and (
            self.terms.binding(stated.number, stated.base) != now.binding
            or weight not in (None, stated.weight)
            or stated.client not in ("", self.client_id)
        ):
            raise Rejected(
                "round", f"{stated}", "the round, base, weight and client of start_round"
            )
        return self.terms.check_weight(stated.weight if weight is None else weight)  # type: ignore[union-attr]

    def _mark(self, now: RoundState, phase: str) -> None:
        if self._journal is not None:
            self._journal.mark(sharing.fingerprint([now.keys]), phase, begun=now.begun)

    def _at(self, phase: str) -> RoundState:
        now = self._round
        if now is None or now.phase != phase:
            got = "none" if now is None else f"one at the phase of {now.phase}"
            raise Rejected("phase", got, f"a masking round at the phase of {phase}")
        return now

    def _check_enough(self, clients: Any) -> None:
        if len(clients) < self.terms.threshold:
            raise Rejected("clients", f"{len(clients)} clients, fewer than {self.terms.threshold}")

    def _set(self, now: RoundState) -> bytes:
        return sharing.fingerprint([now.roster_digest, *(n.encode() for n in now.survivors)])

    def _transport(
        self, now: RoundState, peer: Mapping[str, bytes], sender: str, receiver: str
    ) -> Secret[bytes]:
        purpose = f"share {sender!r} to {receiver!r}"
        return sharing.pair_key(now.transport, peer["transport"], now.binding, purpose)

    def _about(self, now: RoundState, sender: str, receiver: str) -> bytes:
        return sharing.fingerprint([now.binding, sender.encode(), receiver.encode()])

    def _message(self, kind: int, body: bytes | tuple[bytes | memoryview, ...]) -> bytes:
        binding = self._round.binding if self._round else b""
        return wire.write_message(kind, self.client_id, body, binding, self._identity)


def _phase(now: RoundState | None) -> str:
    return "over" if now is None else now.phase


def _seed() -> Secret[bytes]:
    return Secret(secrets.token_bytes(sharing.SEED))


def read_keys(message: bytes, terms: Terms, binding: bytes, client: str) -> dict[str, bytes]:
    """Return a client's public keys for a round.

    Raises:
        Rejected: This client's identity did not sign them for this round.
    """
    sender, body = wire.open_message(message, wire.KEYS, terms, binding)
    if sender != client:
        raise Rejected("key", f"keys of {sender!r} in the place of {client!r:.80}")
    stated = wire.mapping(body, {"transport", "pairs", "own"})
    return {kind: wire.hexadecimal(text, 32) for kind, text in stated.items()}
