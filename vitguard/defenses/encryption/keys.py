"""Keys: made once, kept encrypted under a passphrase, never in a repr, a pickle or a log."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from vitguard.defenses.encryption.authority import Authority
from vitguard.defenses.encryption.backend import Engine, shared_engine
from vitguard.defenses.encryption.keyfile import read_key_file, write_key_file
from vitguard.defenses.encryption.presets import Layout, preset
from vitguard.defenses.encryption.secret import Secret
from vitguard.defenses.encryption.signing import check_public
from vitguard.errors import Rejected, expected

__all__ = ["KeyFacts", "KeySet", "ServerKeys"]

_FAULTS = (KeyError, TypeError, AttributeError, ValueError, OverflowError)


@dataclass(frozen=True)
class KeyFacts:
    """What may be published of keys.

    Args:
        preset, max_clients: The parameters.
        key_id: Random name.
        generation: How many times the keys were rotated.
    """

    preset: str
    max_clients: int
    key_id: str
    generation: int = 0

    @property
    def layout(self) -> Layout:
        """The numbers that preset and client limit imply."""
        return preset(self.preset).layout(self.max_clients)

    @property
    def fingerprint(self) -> bytes:
        """Sixteen bytes that name key, preset and client limit."""
        text = f"vitguard:{self.key_id}:{self.preset}:{self.max_clients}:{self.generation}"
        return hashlib.sha256(text.encode()).digest()[:16]

    @staticmethod
    def read(stored: Mapping[str, Any]) -> KeyFacts:
        """Read them from a key file.

        Raises:
            KeyError, TypeError, ValueError: They are something else.
        """
        counts = stored["max_clients"], stored["generation"]
        names = stored["preset"], stored["key_id"]
        if any(type(n) is not int for n in counts) or any(type(n) is not str for n in names):
            raise TypeError("facts of another type")
        facts = KeyFacts(names[0], counts[0], names[1], counts[1])
        if not (facts.fingerprint and facts.layout):  # raises where they cannot exist
            raise ValueError("facts of no preset")
        return facts


class _Named:
    """What clients' and server's keys have in common: their facts."""

    _facts: KeyFacts

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(preset={self.preset!r}, max_clients={self.max_clients}, "
            f"generation={self.generation}, fingerprint={self.fingerprint.hex()[:8]!r})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"keys are not pickled: save them with {type(self).__name__}.save")

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self  # one secret in memory, not two

    @property
    def preset(self) -> str:
        """Name of the preset."""
        return self._facts.preset

    @property
    def max_clients(self) -> int:
        """Messages that one sum may hold."""
        return self._facts.max_clients

    @property
    def generation(self) -> int:
        """How many times the keys were rotated."""
        return self._facts.generation

    @property
    def fingerprint(self) -> bytes:
        """Sixteen bytes that name these keys; public."""
        return self._facts.fingerprint

    @property
    def layout(self) -> Layout:
        """The numbers that preset and client limit imply."""
        return self._facts.layout


class ServerKeys(_Named):
    """What the clients' side gives the server: it tells clients apart, and decrypts nothing.

    Guarantees:
        Nothing in them decrypts.

    Does not protect against:
        Whoever has them can send as any client: they are secret.

    Make them with `KeySet.for_server`. The server's own `SigningKey` is apart from them.
    """

    def __init__(self, facts: KeyFacts, authority: Authority) -> None:
        self._facts, self.authority = facts, authority

    def save(self, path: str | Path, passphrase: str, *, overwrite: bool = False) -> None:
        """Write the keys encrypted, as `KeySet.save` does."""
        hidden = Secret(passphrase)
        del passphrase
        inner = {"authority": self.authority.to_json()}
        write_key_file(path, "server", asdict(self._facts), inner, hidden, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path, passphrase: str) -> ServerKeys:
        """Read what `save` wrote.

        Raises:
            Rejected: Wrong passphrase, a changed file, one that others may read, or a client's.
            InputError: There is no such file.
        """
        hidden = Secret(passphrase)
        del passphrase
        stored, inner = read_key_file(path, "server", hidden)
        try:
            return ServerKeys(KeyFacts.read(stored), Authority.from_json(inner["authority"]))
        except _FAULTS as error:
            problem = type(error).__name__
        raise Rejected("key", f"another file ({problem})", "the server's keys")


class KeySet(_Named):
    """Keys of the clients' side. One CKKS key is shared by all clients of a run.

    `generate` makes the keys of all clients; whoever sets up the clients keeps them. `for_client`
    is what one client is given, `for_server` what the server is.

    Guarantees:
        The secret key is in no repr, pickle or log, and no message or server key contains it.
        A saved file is encrypted under the passphrase and readable by its owner alone.
        With `for_client` keys nobody sends as another client.

    Does not protect against:
        A client that works with the server: the shared key opens every client's message.

    Examples:
        >>> keys = KeySet.generate(preset="quantised", max_clients=10)
        >>> keys.for_server().fingerprint == keys.fingerprint
        True
    """

    def __init__(
        self, facts: KeyFacts, secret: Any, authority: Authority, server: bytes | None = None
    ) -> None:
        self._facts, self.authority, self.server = facts, authority, server
        self.__secret = secret  # SEAL's object

    @staticmethod
    def generate(
        *, preset: str = "quantised", max_clients: int = 10, server: bytes | None = None
    ) -> KeySet:
        """Make fresh keys.

        Args:
            preset: A name among `PRESETS`.
            max_clients: Messages that one sum may hold; more would overflow, so it is enforced.
            server: The server's verification key, from `SigningKey.public_bytes`: whose sums
                are opened. `trusting` names it later.

        Raises:
            InputError: Unknown preset, more clients than it takes, or no verification key.
            MissingExtra: TenSEAL is not installed.
        """
        facts = KeyFacts(preset, max_clients, secrets.token_hex(16))
        authority = Authority(Secret(secrets.token_bytes(32)))
        checked = None if server is None else check_public(server)
        return KeySet(facts, shared_engine(facts.layout).new_secret(), authority, checked)

    def trusting(self, server: bytes) -> KeySet:
        """Return the keys with another verification key: sums of that server are opened."""
        return KeySet(self._facts, self.__secret, self.authority, check_public(server))

    def rotate(self) -> KeySet:
        """Return fresh keys with the same settings; messages under the old ones are refused."""
        fresh = KeySet.generate(
            preset=self.preset, max_clients=self.max_clients, server=self.server
        )
        facts = replace(fresh._facts, generation=self.generation + 1)
        return KeySet(facts, fresh.__secret, fresh.authority, fresh.server)

    def for_client(self, client_id: str) -> KeySet:
        """Return keys that can send as `client_id` only.

        Raises:
            InputError: It is no text of 1 to 64 bytes.
            Rejected: These are another client's keys.
        """
        return KeySet(self._facts, self.__secret, self.authority.only(client_id), self.server)

    def for_server(self) -> ServerKeys:
        """Return what the server is given, in private: nothing that decrypts.

        Raises:
            Rejected: These are one client's keys, which cannot check others.
        """
        if not self.authority.complete:
            raise Rejected("key", "those of one client", "the keys of all clients")
        return ServerKeys(self._facts, self.authority)

    def open(self, engine: Engine) -> Any:
        """Return SEAL's secret key; for the encryptor and decryptor only."""
        return self.__secret

    def derived(self, purpose: bytes) -> Secret[bytes]:
        """Return 32 bytes that all clients of these keys derive alike and the server cannot.

        Args:
            purpose: What they are for; others give other bytes (HKDF-SHA256).
        """
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        secret = shared_engine(self.layout).secret_bytes(self.__secret)
        return Secret(HKDF(SHA256(), 32, self.fingerprint, purpose).derive(secret.reveal()))

    def save(self, path: str | Path, passphrase: str, *, overwrite: bool = False) -> None:
        """Write the keys encrypted (scrypt, AES-256-GCM), mode 600, atomically.

        Raises:
            InputError: The passphrase is empty, the folder cannot be written, or the file is there
                already and `overwrite` is false.
        """
        hidden = Secret(passphrase)
        del passphrase
        secret = shared_engine(self.layout).secret_bytes(self.__secret)
        facts = {**asdict(self._facts), "server": self.server and self.server.hex()}
        inner = {
            "secret": Secret(base64.b64encode(secret.reveal()).decode()),
            "authority": self.authority.to_json(),
        }
        write_key_file(path, "client", facts, inner, hidden, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path, passphrase: str) -> KeySet:
        """Read what `save` wrote, in this version or the one before.

        A file of the version before names no server: call `trusting` before its keys open a sum.

        Raises:
            Rejected: Wrong passphrase, a changed file, or a file that others may read.
            InputError: There is no such file.
        """
        hidden = Secret(passphrase)
        del passphrase
        stored, inner = read_key_file(path, "client", hidden)
        try:
            return _loaded(stored, inner)
        except _FAULTS as error:
            problem = type(error).__name__
        raise Rejected("key", f"another file ({problem})", "a key file")


def _loaded(stored: Mapping[str, Any], inner: Mapping[str, Secret[Any]]) -> KeySet:
    facts, named = KeyFacts.read(stored), stored.get("server")
    if named is not None and not isinstance(named, str):
        raise expected("a verification key as text", type(named))
    secret = Secret(base64.b64decode(inner["secret"].reveal(), validate=True))
    return KeySet(
        facts,
        shared_engine(facts.layout).secret(secret),
        Authority.from_json(inner["authority"]),
        None if named is None else check_public(bytes.fromhex(named)),
    )
