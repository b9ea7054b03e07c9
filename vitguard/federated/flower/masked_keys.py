"""What the parties of a masked Flower federation hold: an identity each, and common terms."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from vitguard.defenses.encryption import Manifest, SigningKey
from vitguard.defenses.masking import Journal, MaskingClient, Terms
from vitguard.errors import expected
from vitguard.federated.flower.keys import _checked, _environment, refuse_taken
from vitguard.files import write_atomically

__all__ = ["MaskedFederation", "MaskingIdentity", "write_masked_keys"]

_FOLDER, _PASSPHRASE, _CLIENT = "VITGUARD_KEYS", "VITGUARD_PASSPHRASE", "VITGUARD_CLIENT"


@dataclass(frozen=True)
class MaskingIdentity:
    """What one client needs for masks: its name, its own signing key, and the terms of all.

    Args:
        journal: File in which each answer is marked before it leaves. A SuperNode may run several
            processes of one client at once, each from the same `context.state`; without a journal
            a dishonest server could have both answer.
    """

    client: str
    identity: SigningKey
    terms: Terms
    journal: Path | None = None

    def masker(self) -> MaskingClient:
        """Return the client's side of the rounds, at its beginning."""
        journal = None if self.journal is None else Journal(self.journal)
        return MaskingClient(self.terms, self.identity, client_id=self.client, journal=journal)

    @staticmethod
    def from_environment(context: Context) -> MaskingIdentity:
        """Read the client's files from the folder in VITGUARD_KEYS with VITGUARD_PASSPHRASE.

        The client is the one in VITGUARD_CLIENT, or else Flower's `partition-id` of the node. Its
        journal, `client-NAME.journal`, is in the same folder.
        """
        name = os.environ.get(_CLIENT) or str(context.node_config.get("partition-id", ""))
        return _identity(_environment(_FOLDER), _checked(name), _environment(_PASSPHRASE))


@dataclass(frozen=True)
class MaskedFederation:
    """What the server needs for masks: its own signing key, and the terms of all."""

    signing: SigningKey
    terms: Terms

    @staticmethod
    def from_environment() -> MaskedFederation:
        """Read the server's files from the folder in VITGUARD_KEYS with VITGUARD_PASSPHRASE."""
        folder = Path(_environment(_FOLDER))
        signing = SigningKey.load(folder / "signing.keys", _environment(_PASSPHRASE))
        return MaskedFederation(signing, _terms(folder))


def write_masked_keys(
    folder: str | Path,
    passphrase: str,
    manifest: Manifest,
    identities: Mapping[str, SigningKey | bytes],
    *,
    signing: SigningKey | None = None,
    threshold: int = 0,
) -> Terms:
    """Write the terms, the server's key, and the identity of each client that is given whole.

    In a deployment each client makes its own `SigningKey`, gives away `public_bytes()`, and keeps
    the rest as `client-NAME.identity`. The server must not be the one who collects them.

    Args:
        folder: An existing folder. Each party is given its own file alone, and `terms.json`.
        identities: By name: what VITGUARD_CLIENT says, or the `partition-id` ("0", "1", ...).
        signing: The server's key; by default the one in the folder's `signing.keys`, or a new one.
        threshold: As in `Terms`.

    Raises:
        InputError: The folder has terms or identities already, which are left as they are; or an
            argument that cannot be.
    """
    if not isinstance(identities, Mapping):
        raise expected("a signing key of each client by its name", type(identities).__name__)
    place = Path(folder)
    public = {
        _checked(name): key.public_bytes() if isinstance(key, SigningKey) else key
        for name, key in identities.items()
    }
    whole = {
        f"client-{name}.identity": key
        for name, key in identities.items()
        if isinstance(key, SigningKey)
    }
    refuse_taken(place, ["terms.json", *whole])
    file = place / "signing.keys"
    known = signing is None and file.exists()
    if known:
        signing = SigningKey.load(file, passphrase)
    signing = signing or SigningKey.generate()
    terms = Terms(manifest, public, signing.public_bytes(), threshold)
    if not known:
        refuse_taken(place, [file.name])
    # of two at once one gets this far
    write_atomically(place / "terms.json", terms.to_json(), overwrite=False)
    if not known:
        signing.save(file, passphrase)
    for name, key in whole.items():
        key.save(place / name, passphrase)
    _identity.cache_clear()  # a notebook may have used older ones of this folder
    return terms


@functools.lru_cache(maxsize=16)
def _identity(folder: str, name: str, passphrase: str) -> MaskingIdentity:
    identity = SigningKey.load(Path(folder) / f"client-{name}.identity", passphrase)
    journal = Path(folder) / f"client-{name}.journal"
    return MaskingIdentity(name, identity, _terms(Path(folder)), journal)


def _terms(folder: Path) -> Terms:
    try:
        return Terms.from_json((folder / "terms.json").read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise expected("a terms.json beside the keys", type(error).__name__) from error
