"""The model as it stands, sealed by one client for the others: it ends a growing list of sums."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from vitguard.defenses.encryption import KeySet, Manifest, model_version
from vitguard.errors import Rejected

__all__ = ["Snapshot", "vouch"]

_PROOF, _NONCE, _VERSION = 32, 12, 64  # bytes


def vouch(
    keys: KeySet, manifest: Manifest, number: int, version: str, weights: Mapping[str, Tensor]
) -> bytes:
    """Return 32 bytes that clients with the same weights make alike; the server learns nothing.

    Args:
        number: The last round in the weights.
        version: Of the model, as sums have led to it.
    """
    said = _binding(manifest, number, version) + model_version(weights).encode()
    return hmac.digest(keys.derived(b"vitguard vouch").reveal(), said, "sha256")


@dataclass(frozen=True)
class Snapshot:
    """A whole model under a key that all clients share and the server lacks.

    Args:
        number: The last round in it.
        version: Of the model.
        proof: What `vouch` returns for its weights.
        sealed: Nonce and AES-256-GCM ciphertext of the weights.
    """

    number: int
    version: str
    proof: bytes
    sealed: bytes

    @staticmethod
    def of(
        keys: KeySet, manifest: Manifest, number: int, version: str, weights: Mapping[str, Tensor]
    ) -> Snapshot:
        """Seal the weights of a client."""
        proof = vouch(keys, manifest, number, version, weights)
        nonce, plain = secrets.token_bytes(_NONCE), save(dict(weights))
        bound = _binding(manifest, number, version) + proof
        return Snapshot(number, version, proof, nonce + _cipher(keys).encrypt(nonce, plain, bound))

    def open(self, keys: KeySet, manifest: Manifest) -> dict[str, Tensor]:
        """Return the weights.

        Raises:
            Rejected: They are not those that clients vouched for, or of another key or run.
        """
        from cryptography.exceptions import InvalidTag

        bound = _binding(manifest, self.number, self.version) + self.proof
        try:
            plain = _cipher(keys).decrypt(self.sealed[:_NONCE], self.sealed[_NONCE:], bound)
            weights = load(plain)
        except (InvalidTag, ValueError) as error:
            raise Rejected("snapshot", "a model under another key or of another run") from error
        own = vouch(keys, manifest, self.number, self.version, weights)
        if not hmac.compare_digest(own, self.proof):
            raise Rejected("snapshot", "a model that other clients did not vouch for")
        return weights

    def to_bytes(self) -> bytes:
        """Return it as bytes."""
        return self.version.encode() + self.proof + self.sealed

    @staticmethod
    def from_bytes(number: int, data: bytes) -> Snapshot:
        """Read what `to_bytes` wrote.

        Raises:
            Rejected: It is something else.
        """
        version, rest = bytes(data[:_VERSION]), bytes(data[_VERSION:])
        if len(rest) < _PROOF + _NONCE + 16 or not all(c in b"0123456789abcdef" for c in version):
            raise Rejected("snapshot", f"{len(data)} bytes that are no model")
        return Snapshot(number, version.decode(), rest[:_PROOF], rest[_PROOF:])


def _binding(manifest: Manifest, number: int, version: str) -> bytes:
    return manifest.digest() + number.to_bytes(8, "big") + version.encode()


def _cipher(keys: KeySet) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(keys.derived(b"vitguard snapshot").reveal())
