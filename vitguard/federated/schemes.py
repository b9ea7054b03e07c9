"""How a local round adds updates: plain, encrypted or masked, by the classes of real clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from vitguard.core import Update
from vitguard.defenses.base import Defense, Draws, UpdateDefense
from vitguard.defenses.encryption import (
    Aggregator,
    Decryptor,
    EncryptedGradients,
    Encryptor,
    KeySet,
    Manifest,
    SigningKey,
)
from vitguard.defenses.masking import (
    MaskedAggregation,
    MaskingClient,
    MaskingServer,
    SumOpener,
    Terms,
)
from vitguard.errors import Rejected, expected
from vitguard.vit import Anatomy

__all__ = ["Encrypted", "Masked", "Plain", "Remembered", "Scheme", "sealing_of"]

_SEALING = (EncryptedGradients, MaskedAggregation)


def sealing_of(stack: Iterable[Defense]) -> EncryptedGradients | MaskedAggregation | None:
    """Return the defense of a stack that hides updates until they are added, if there is one.

    Raises:
        InputError: There are two.
    """
    found = [d for d in stack if isinstance(d, _SEALING)]
    if len(found) > 1:
        raise expected("one of encryption and masking", "both")
    return found[0] if found else None


@dataclass(frozen=True)
class Remembered(UpdateDefense):
    """Changes nothing: it lets a client of a local round know what it sends before that is sealed.

    Args:
        kept: Filled with the tensors of the last update.
    """

    name: ClassVar[str] = "remembered"
    kept: dict[str, Tensor]

    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return the update as it is."""
        self.kept.clear()
        self.kept.update(update.tensors)
        return update


class Scheme(ABC):
    """The way that a sum is made; it lasts for all rounds of a federation."""

    opened_by: ClassVar[str] = ""
    binds: ClassVar[bool] = False
    """Whether clients with other versions of the model refuse to be in one sum, by themselves."""

    @abstractmethod
    def with_keys(self, client: str, defense: Defense) -> Defense:
        """Return a sealing defense with the keys of a client."""

    @abstractmethod
    def begin(
        self, number: int, base: str, weights: Mapping[str, float], versions: Mapping[str, str]
    ) -> None:
        """Begin a round of these clients with their weights.

        Args:
            versions: Of the model that each client was handed, as it names it itself.

        Raises:
            Rejected: There are too few, or they were handed other models and the scheme `binds`.
        """

    @abstractmethod
    def add(self, client: str, update: Update) -> None:
        """Let the server take a client's message.

        Raises:
            Rejected: It does not hold.
        """

    @abstractmethod
    def finish(self) -> tuple[bytes, dict[str, Tensor]]:
        """Return the sum as it is sent, and the average of what was sealed, as a client opens it.

        Raises:
            Rejected: There are too few, or clients refuse the sum.
        """


class Plain(Scheme):
    """Nothing is sealed: the server adds what it reads."""

    def with_keys(self, client: str, defense: Defense) -> Defense:
        return defense

    def begin(
        self, number: int, base: str, weights: Mapping[str, float], versions: Mapping[str, str]
    ) -> None:
        self._count = 0

    def add(self, client: str, update: Update) -> None:
        if update.payloads:
            raise Rejected("sealed", "a sealed message in a plain round", "plain tensors")
        self._count += 1

    def finish(self) -> tuple[bytes, dict[str, Tensor]]:
        if not self._count:
            raise Rejected("clients", "no message", "at least one")
        return b"", {}


class Encrypted(Scheme):
    """CKKS under a key that all clients share; the server holds none that decrypts."""

    opened_by = (
        "A sum is opened by every client, and not by the server: its rows are what a client sees. "
        "All clients share one key: a server that works with any of them reads each message."
    )

    def __init__(self, preset: str, manifest: Manifest, clients: int) -> None:
        self._signing = SigningKey.generate()
        self._keys = KeySet.generate(
            preset=preset, max_clients=max(clients, 2), server=self._signing.public_bytes()
        )
        self._manifest = manifest
        self._opener = Decryptor(self._keys, manifest)  # all clients open the same bytes

    def with_keys(self, client: str, defense: Defense) -> Defense:
        keys = self._keys.for_client(client)
        own = Encryptor(keys, self._manifest, client_id=client)
        return replace(defense, encryptor=own)  # type: ignore[call-arg]

    def begin(
        self, number: int, base: str, weights: Mapping[str, float], versions: Mapping[str, str]
    ) -> None:
        self._number, self._base = number, base
        self._sum = Aggregator(
            self._keys.for_server(), self._manifest, signing=self._signing, round_id=number,
            base=base,
        )  # fmt: skip

    def add(self, client: str, update: Update) -> None:
        self._sum.add(_payload(update, "encryption"), sender=client)

    def finish(self) -> tuple[bytes, dict[str, Tensor]]:
        total = self._sum.finish()
        return total, self._opener.decrypt(total, round_id=self._number, base=self._base)


class Masked(Scheme):
    """Pairwise masks: each client with a key of its own, three clients at least."""

    opened_by = "A masked sum is read by the server as well as by every client."
    binds = True

    def __init__(self, manifest: Manifest, clients: Iterable[str]) -> None:
        self._signing = SigningKey.generate()
        identities = {c: SigningKey.generate() for c in clients}
        public = {c: key.public_bytes() for c, key in identities.items()}
        self._terms = Terms(manifest, public, self._signing.public_bytes())
        self._clients = {
            c: MaskingClient(self._terms, key, client_id=c) for c, key in identities.items()
        }
        self._opener = SumOpener(self._terms)

    def with_keys(self, client: str, defense: Defense) -> Defense:
        return replace(defense, client=self._clients[client])  # type: ignore[call-arg]

    def begin(
        self, number: int, base: str, weights: Mapping[str, float], versions: Mapping[str, str]
    ) -> None:
        self._number, self._base = number, base
        server = self._server = MaskingServer(
            self._terms, signing=self._signing, round_id=number, base=base
        )
        there = {c: self._clients[c] for c in weights}
        for name, client in there.items():
            server.add_keys(client.start_round(number, weight=weights[name], base=versions[name]))
        roster = server.roster()
        for client in there.values():
            server.add_shares(client.share_keys(roster))
        for name, client in there.items():
            client.take_shares(server.inbox(name))

    def add(self, client: str, update: Update) -> None:
        message = _payload(update, "masking")
        self._server.add_masked(message)

    def finish(self) -> tuple[bytes, dict[str, Tensor]]:
        server = self._server
        survivors = server.survivors()
        for name in server.clients:
            server.add_agreement(self._clients[name].agree(survivors))
        agreements = server.agreements()
        for name in server.clients:
            server.add_answer(self._clients[name].answer(agreements))
        total = server.finish()
        return total, self._opener.open(total, round_id=self._number, base=self._base)


def _payload(update: Update, scheme: str) -> bytes:
    if list(update.payloads) != [scheme]:
        raise Rejected("plain", "a plain message, or one sealed otherwise", f"one by {scheme}")
    return update.payloads[scheme]
