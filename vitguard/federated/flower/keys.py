"""The keys of a Flower federation: in files, opened with a passphrase of the environment."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, SupportsFloat

from flwr.app import Context
from torch import Tensor

from vitguard.defenses.encryption import (
    Encryptor,
    KeySet,
    Manifest,
    ServerKeys,
    SigningKey,
)
from vitguard.errors import InputError, expected
from vitguard.files import write_atomically

__all__ = ["ClientKeys", "Federation", "make_keys"]

_FOLDER, _PASSPHRASE, _CLIENT = "VITGUARD_KEYS", "VITGUARD_PASSPHRASE", "VITGUARD_CLIENT"


@dataclass(frozen=True)
class ClientKeys:
    """What one client needs: its keys, its name, and what is encrypted.

    Args:
        min_clients: The fewest clients of a sum that this client opens, at least 2.
    """

    client: str
    keys: KeySet
    manifest: Manifest
    min_clients: int = 2

    def encryptor(self, *, outliers: Literal["refuse", "clip"] = "refuse") -> Encryptor:
        """Return the encryptor of this client; `guard.round` names the round."""
        return Encryptor(self.keys, self.manifest, client_id=self.client, outliers=outliers)

    @staticmethod
    def from_environment(context: Context) -> ClientKeys:
        """Read the client's files from the folder in VITGUARD_KEYS with VITGUARD_PASSPHRASE.

        The client is the one in VITGUARD_CLIENT, or else Flower's `partition-id` of the node.
        """
        name = os.environ.get(_CLIENT) or str(context.node_config.get("partition-id", ""))
        return _client_keys(_environment(_FOLDER), _checked(name), _environment(_PASSPHRASE))


@dataclass(frozen=True)
class Federation:
    """What the server needs: keys that tell clients apart, its signing key, and the manifest."""

    keys: ServerKeys
    signing: SigningKey
    manifest: Manifest

    @staticmethod
    def from_environment() -> Federation:
        """Read the server's files from the folder in VITGUARD_KEYS with VITGUARD_PASSPHRASE."""
        folder, passphrase = Path(_environment(_FOLDER)), _environment(_PASSPHRASE)
        return Federation(
            ServerKeys.load(folder / "server.keys", passphrase),
            SigningKey.load(folder / "signing.keys", passphrase),
            _manifest(folder),
        )


def make_keys(
    folder: str | Path,
    passphrase: str,
    encrypted: Mapping[str, Tensor],
    *,
    clients: Iterable[str | int],
    bounds: float | Mapping[str, float],
    max_weight: SupportsFloat,
    preset: str = "quantised",
) -> None:
    """Write the keys of a federation: one file for each client, two for the server, a manifest.

    Args:
        folder: An existing folder. Each party is given its own files alone, and the manifest.
        encrypted: `guard.encrypted()` of a guard with the clients' stack.
        clients: Their names: what VITGUARD_CLIENT says, or the `partition-id` ("0", "1", ...).
        bounds: The largest absolute value of an update.
        max_weight: The largest weight of a client: its number of examples.

    Raises:
        InputError: The folder has keys already, which are left as they are; or an argument that
            cannot be.
    """
    names, place = _names(clients), Path(folder)
    own = [f"client-{name}.keys" for name in names]
    refuse_taken(place, ["server.keys", "signing.keys", "manifest.json", *own])
    signing = SigningKey.generate()
    keys = KeySet.generate(
        preset=preset, max_clients=max(2, len(names)), server=signing.public_bytes()
    )
    manifest = Manifest.of(encrypted, bounds=bounds, max_weight=max_weight)
    keys.for_server().save(place / "server.keys", passphrase)  # of two at once one gets this far
    signing.save(place / "signing.keys", passphrase)
    for name in names:
        keys.for_client(name).save(place / f"client-{name}.keys", passphrase)
    write_atomically(place / "manifest.json", manifest.to_json(), overwrite=False)
    _client_keys.cache_clear()  # a notebook may have used older ones of this folder


def refuse_taken(folder: Path, names: Iterable[str]) -> None:
    """Raise InputError where a file is there already: keys of two runs would be mixed."""
    if there := next((name for name in names if (folder / name).exists()), None):
        raise expected(
            f"a folder without {there}", f"{folder}, which has it",
            "Make a folder for each run, or remove the old keys.",
        )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _client_keys(folder: str, name: str, passphrase: str) -> ClientKeys:
    keys = KeySet.load(Path(folder) / f"client-{name}.keys", passphrase)
    return ClientKeys(name, keys, _manifest(Path(folder)))


def _manifest(folder: Path) -> Manifest:
    try:
        return Manifest.from_json((folder / "manifest.json").read_text())
    except OSError as error:
        raise expected("a manifest.json beside the keys", error.strerror) from error


def _environment(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InputError(f"Expected {name} in the environment, got none. Keys are never sent.")
    return value


def _names(clients: object) -> list[str]:
    """Return the names of clients, each once; a text alone would be taken for its letters."""
    if isinstance(clients, str | bytes) or not isinstance(clients, Iterable):
        raise expected("the names of all clients in a list", repr(clients)[:80])
    names = [_checked(str(c) if type(c) is int else c) for c in clients]
    if len(names) < 2 or len({*names}) < len(names):
        raise expected("at least two clients, each by a name of its own", repr(names)[:80])
    return names


def _checked(name: object) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise expected(
            "a client's name of letters, digits, - and _", repr(name)[:80],
            "Set VITGUARD_CLIENT, or partition-id in the node's configuration.",
        )  # fmt: skip
    return name
