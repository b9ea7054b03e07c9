"""Keys: made once, kept encrypted under a passphrase, never in a repr, a pickle or a log."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vitguard.defenses.encryption.authority import Authority
from vitguard.defenses.encryption.backend import Engine, shared_engine
from vitguard.defenses.encryption.keyfile import cipher_of, decrypt, read_private, write_private
from vitguard.defenses.encryption.presets import Layout, preset
from vitguard.errors import Rejected, expected

__all__ = ["KeySet", "ServerKeys"]

_KEY_FILE = 1


@dataclass(frozen=True)
class ServerKeys:
    """What a server holds: parameters and authentication keys, nothing that decrypts.

    The authentication keys let the server tell clients apart and sign sums. They stay between
    server and clients, though they read nothing.
    """

    preset: str
    max_clients: int
    key_id: str
    generation: int = 0
    authority: Authority = field(default_factory=lambda: Authority(None), repr=False)

    @property
    def layout(self) -> Layout:
        """The numbers that preset and client limit imply."""
        return preset(self.preset).layout(self.max_clients)

    @property
    def fingerprint(self) -> bytes:
        """Sixteen bytes that name key, preset and client limit; public."""
        text = f"vitguard:{self.key_id}:{self.preset}:{self.max_clients}:{self.generation}"
        return hashlib.sha256(text.encode()).digest()[:16]

    def public_bytes(self) -> bytes:
        """Return what the server is given."""
        facts = _facts(self)
        facts["authority"] = self.authority.to_bytes().decode()
        return json.dumps(facts, sort_keys=True).encode()

    @staticmethod
    def load(data: bytes) -> ServerKeys:
        """Read `public_bytes`.

        Raises:
            Rejected: They are something else, such as a client's key file.
        """
        try:
            facts = json.loads(data)
            if facts["version"] != _KEY_FILE or "secret" in facts:
                raise Rejected("key", "a client's key file", "the server's keys")
            return ServerKeys(
                preset(facts["preset"]).name,
                int(facts["max_clients"]),
                str(facts["key_id"]),
                int(facts["generation"]),
                Authority.from_bytes(facts["authority"].encode()),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, Rejected):
                raise
            raise Rejected(
                "key", f"bytes that are no server key ({type(error).__name__})"
            ) from error


class KeySet:
    """A client's keys. One CKKS key is shared by all clients of a run.

    Guarantees:
        The secret key is in no repr, pickle or log, and no message or server key contains it.
        A saved file is encrypted under the passphrase and readable by its owner alone.

    Does not protect against:
        A client that works with the server: the shared key opens every client's message.

    Examples:
        >>> keys = KeySet.generate(preset="quantised", max_clients=10)
        >>> server = ServerKeys.load(keys.public_bytes())
        >>> server.fingerprint == keys.fingerprint
        True
    """

    def __init__(self, public: ServerKeys, secret: bytes) -> None:
        self._public = public
        self.__secret = secret

    @staticmethod
    def generate(*, preset: str = "quantised", max_clients: int = 10) -> KeySet:
        """Make fresh keys.

        Args:
            preset: A name among `PRESETS`.
            max_clients: Messages that one sum may hold; more would overflow, so it is enforced.

        Raises:
            InputError: Unknown preset, or more clients than it takes.
            MissingExtra: TenSEAL is not installed.
        """
        authority = Authority(secrets.token_bytes(32))
        public = ServerKeys(preset, max_clients, secrets.token_hex(16), 0, authority)
        return KeySet(public, shared_engine(public.layout).new_secret())

    def rotate(self) -> KeySet:
        """Return fresh keys with the same settings; messages under the old ones are refused."""
        fresh = KeySet.generate(preset=self.preset, max_clients=self.max_clients)
        inner = fresh._public
        public = ServerKeys(
            inner.preset, inner.max_clients, inner.key_id, self.generation + 1, inner.authority
        )
        return KeySet(public, fresh.__secret)

    def for_client(self, client_id: str) -> KeySet:
        """Return keys that can send as `client_id` only."""
        p = self._public
        authority = p.authority.only(f"client:{client_id}", "server")
        public = ServerKeys(p.preset, p.max_clients, p.key_id, p.generation, authority)
        return KeySet(public, self.__secret)

    def __repr__(self) -> str:
        return (
            f"KeySet(preset={self.preset!r}, max_clients={self.max_clients}, "
            f"generation={self.generation}, fingerprint={self.fingerprint.hex()[:8]!r})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are not pickled: save them with KeySet.save")

    def __copy__(self) -> KeySet:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> KeySet:
        return self  # one secret in memory, not two

    @property
    def preset(self) -> str:
        """Name of the preset."""
        return self._public.preset

    @property
    def max_clients(self) -> int:
        """Messages that one sum may hold."""
        return self._public.max_clients

    @property
    def generation(self) -> int:
        """How many times the keys were rotated."""
        return self._public.generation

    @property
    def fingerprint(self) -> bytes:
        """Sixteen bytes that name these keys; public."""
        return self._public.fingerprint

    @property
    def layout(self) -> Layout:
        """The numbers that preset and client limit imply."""
        return self._public.layout

    @property
    def authority(self) -> Authority:
        """The message authentication keys held here."""
        return self._public.authority

    def public_bytes(self) -> bytes:
        """Return what the server is given: nothing that decrypts."""
        return self._public.public_bytes()

    def open(self, engine: Engine) -> Any:
        """Return SEAL's secret key for `engine`; for the encryptor and decryptor only."""
        return engine.secret(self.__secret)

    def save(self, path: str | Path, passphrase: str, *, overwrite: bool = False) -> None:
        """Write the keys encrypted (scrypt, AES-256-GCM), mode 600, atomically.

        Raises:
            InputError: The passphrase is empty, the folder cannot be written, or the file is there
                already and `overwrite` is false.
        """
        if not overwrite and Path(path).exists():
            raise expected(
                "a new key file", f"{path}, which is there already",
                "Give another path. overwrite=True destroys the keys in it.",
            )  # fmt: skip
        salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
        facts = _facts(self._public)
        facts["salt"], facts["nonce"] = salt.hex(), nonce.hex()
        inner = {
            "secret": base64.b64encode(self.__secret).decode(),
            "authority": self.authority.to_bytes().decode(),
        }
        associated = json.dumps(facts, sort_keys=True).encode()
        cipher = cipher_of(passphrase, salt)
        sealed = cipher.encrypt(nonce, json.dumps(inner).encode(), associated)
        facts["secret"] = base64.b64encode(sealed).decode()
        write_private(Path(path), json.dumps(facts).encode())

    @staticmethod
    def load(path: str | Path, passphrase: str) -> KeySet:
        """Read what `save` wrote.

        Raises:
            Rejected: Wrong passphrase, a changed file, or a file that others may read.
            InputError: There is no such file.
        """
        content = read_private(Path(path))
        try:
            facts = json.loads(content)
            sealed = base64.b64decode(facts.pop("secret"), validate=True)
            salt, nonce = bytes.fromhex(facts["salt"]), bytes.fromhex(facts["nonce"])
            if facts["version"] != _KEY_FILE:
                raise Rejected("version", f"version {facts['version']}", "a key file of version 1")
            associated = json.dumps(facts, sort_keys=True).encode()
            inner = json.loads(decrypt(cipher_of(passphrase, salt), nonce, sealed, associated))
            public = ServerKeys(
                preset(facts["preset"]).name,
                int(facts["max_clients"]),
                str(facts["key_id"]),
                int(facts["generation"]),
                Authority.from_bytes(inner["authority"].encode()),
            )
            keys = KeySet(public, base64.b64decode(inner["secret"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, Rejected):
                raise
            raise Rejected("key", f"another file ({type(error).__name__})", "a key file") from error
        return keys


def _facts(public: ServerKeys) -> dict[str, Any]:
    return {
        "version": _KEY_FILE,
        "preset": public.preset,
        "max_clients": public.max_clients,
        "key_id": public.key_id,
        "generation": public.generation,
    }
