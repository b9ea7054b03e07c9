"""The wire format: a header, ciphertexts, and proof of the sender over both, checked first.

::

    header   magic, version, kind, preset, key fingerprint, manifest digest, round, base, nonce,
             client limit, clients in it, weight, values, ciphertexts, sender
    table    length of each ciphertext, 4 bytes each
    body     the ciphertexts, as SEAL writes them
    proof    of the SHA-256 of everything before: of a client's message its HMAC-SHA256 under the
             client's key, of a sum the server's Ed25519 signature

Bounds and shapes are in the manifest, which the digest stands for. Nothing in a message chooses a
size, a scale or a parameter: they follow from keys and manifest, and a message that differs from
them is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vitguard.defenses.encryption.authority import LONGEST_ID, check_id
from vitguard.defenses.encryption.keys import KeySet, ServerKeys
from vitguard.defenses.encryption.manifest import LIGHTEST, Manifest, check_manifest
from vitguard.defenses.encryption.signing import verify
from vitguard.errors import Rejected, expected

__all__ = [
    "MESSAGE",
    "SUM",
    "Context",
    "Header",
    "count_values",
    "open_message",
    "write_message",
]

MAGIC = b"VGHE"
VERSION = 2
MESSAGE, SUM = 1, 2
SERVER = "server"
_FIXED = struct.Struct(">4sBB12s16s32sQ32s16sHHdQIB")
_PROOF = {MESSAGE: 32, SUM: 64}  # bytes


@dataclass(frozen=True)
class Context:
    """What a message must agree with: keys, manifest, round and version of the public model."""

    keys: KeySet | ServerKeys
    manifest: Manifest
    round_id: int
    base: str

    def __post_init__(self) -> None:
        check_manifest(self.manifest)
        if type(self.round_id) is not int or not 0 <= self.round_id < 2**63:
            raise expected("a whole round number of at least 0", repr(self.round_id))
        if not isinstance(self.base, str):
            raise expected(
                "the version of the public model as text", repr(self.base)[:80],
                "model_version makes one.",
            )  # fmt: skip

    @property
    def base_digest(self) -> bytes:
        """Thirty-two bytes that stand for the version of the public model."""
        return hashlib.sha256(self.base.encode("utf-8", "surrogatepass")).digest()

    def binding(self) -> bytes:
        """Return the bytes that canaries depend on."""
        parts = (self.keys.fingerprint, self.manifest.digest(), self.base_digest)
        return hashlib.sha256(b"".join(parts) + self.round_id.to_bytes(8, "big")).digest()


@dataclass(frozen=True)
class Header:
    """What a message says about itself.

    Args:
        kind: `MESSAGE` of one client or `SUM` of several.
        sender: Client id, or `server`.
        clients: Messages in it.
        weight: Weight of the client, or the sum of weights.
        nonce: Drawn for each message.
    """

    kind: int
    sender: str
    clients: int
    weight: float
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(16))


def write_message(
    header: Header,
    ciphertexts: Sequence[bytes],
    context: Context,
    prove: Callable[[bytes], bytes],
) -> bytes:
    """Return the bytes of a message.

    Args:
        prove: From the digest of all else to the sender's proof.

    Raises:
        InputError: The sender's name is empty or longer than 64 bytes.
    """
    sender, keys = check_id(header.sender), context.keys
    fixed = _FIXED.pack(
        MAGIC, VERSION, header.kind, keys.preset.encode(), keys.fingerprint,
        context.manifest.digest(), context.round_id, context.base_digest, header.nonce,
        keys.max_clients, header.clients, header.weight, context.manifest.values,
        len(ciphertexts), len(sender),
    )  # fmt: skip
    table = struct.pack(f">{len(ciphertexts)}I", *map(len, ciphertexts))
    parts = [fixed, sender, table, *ciphertexts]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return b"".join((*parts, prove(digest.digest())))


def count_values(data: bytes) -> int | None:
    """Return how many values a message says that it holds, unchecked; None where it is none."""
    return _FIXED.unpack_from(data)[12] if len(data) >= _FIXED.size else None


def open_message(data: bytes, kind: int, context: Context) -> tuple[Header, list[memoryview]]:
    """Check a message in full and return its header and ciphertexts, unparsed views of `data`.

    Raises:
        Rejected: `cause` is one of type, oversize, truncated, magic, version, kind, preset, key,
            code, signature, manifest, round, base, clients, weight, counts.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise Rejected("type", f"{type(data).__name__} where bytes were due")
    keys, layout, size = context.keys, context.keys.layout, _PROOF[kind]
    chunks = layout.chunks(context.manifest.values)
    most = _FIXED.size + LONGEST_ID + chunks * (16 * layout.degree + 4096 + 4) + size
    length = data.nbytes if isinstance(data, memoryview) else len(data)
    if length > most:
        raise Rejected("oversize", f"{length} bytes where at most {most} can be right")
    data = bytes(data)
    if len(data) < _FIXED.size + size:
        raise Rejected("truncated", f"{len(data)} bytes")
    (
        magic, version, found, preset, fingerprint, manifest, round_id, base, nonce,
        max_clients, clients, weight, values, count, id_size,
    ) = _FIXED.unpack_from(data)  # fmt: skip
    if magic != MAGIC:
        raise Rejected("magic", "bytes that are no vitguard message")
    if version != VERSION:
        other = "an earlier" if version < VERSION else "a later"
        raise Rejected("version", f"wire version {version} of {other} vitguard; this is {VERSION}")
    if found != kind:
        names = {MESSAGE: "a client's message", SUM: "a sum"}
        raise Rejected("kind", f"{names.get(found, 'another kind')} where {names[kind]} was due")
    if preset.rstrip(b"\0") != keys.preset.encode():
        raise Rejected("preset", f"preset {preset!r} under keys of {keys.preset!r}")
    if fingerprint != keys.fingerprint:
        raise Rejected("key", "a message under other keys")
    table_at = _FIXED.size + id_size
    body_at = table_at + 4 * count
    if count != chunks or body_at > len(data) - size:
        raise Rejected("counts", f"{count} ciphertexts where {chunks} were due")
    try:
        header = Header(kind, data[_FIXED.size : table_at].decode(), clients, weight, nonce)
    except UnicodeDecodeError as error:
        raise Rejected("code", "a sender that is no text") from error
    view = memoryview(data)
    _check_proof(header, hashlib.sha256(view[:-size]).digest(), data[-size:], keys)
    lengths = struct.unpack_from(f">{count}I", data, table_at)
    if body_at + sum(lengths) + size != len(data):
        raise Rejected("counts", "ciphertexts that do not fill the message")
    if manifest != context.manifest.digest() or values != context.manifest.values:
        raise Rejected("manifest", "a message of another run, or of other tensors or bounds")
    if round_id != context.round_id:
        raise Rejected("round", f"a message of round {round_id} in round {context.round_id}")
    if base != context.base_digest:
        raise Rejected("base", "a message about another version of the public model")
    limit = keys.max_clients if kind == SUM else 1
    if max_clients != keys.max_clients or not 1 <= clients <= limit:
        raise Rejected("clients", f"{clients} clients, limit {max_clients}")
    heaviest = context.manifest.max_weight * clients
    lightest = context.manifest.max_weight * LIGHTEST
    if not (math.isfinite(weight) and lightest <= weight <= heaviest * (1 + 1e-9)):
        raise Rejected("weight", f"weight {weight} where at most {heaviest} can be right")
    ciphertexts, at = [], body_at
    for length in lengths:
        ciphertexts.append(view[at : at + length])
        at += length
    return header, ciphertexts


def _check_proof(header: Header, digest: bytes, proof: bytes, keys: KeySet | ServerKeys) -> None:
    """Raise Rejected unless the sender made the message."""
    if header.kind == SUM:
        if not isinstance(keys, KeySet) or keys.server is None:
            raise Rejected("key", "a sum, and no server's verification key to check it with")
        verify(keys.server, digest, proof)
    elif not hmac.compare_digest(keys.authority.code(header.sender, digest), proof):
        raise Rejected("code", "a message whose authentication code does not match")
