"""The wire format: what a message is bound to, who made it, and a signature over all of it.

::

    head    magic, version, kind, binding of run, round, base and terms, length of the sender
    sender  client id, or `server`
    body    of keys, shares, survivors, answers: JSON; of masked values and sums: numbers
    proof   the sender's Ed25519 signature of the SHA-256 of everything before

A body's size follows from the terms; nothing in a message chooses one.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from typing import Any

from vitguard.defenses.encryption.authority import check_id
from vitguard.defenses.encryption.signing import SigningKey, verify
from vitguard.defenses.masking.terms import Terms
from vitguard.errors import InputError, Rejected
from vitguard.files import parsed_json

__all__ = [
    "KEYS", "ROSTER", "SHARES", "INBOX", "MASKED", "SURVIVORS", "AGREED", "AGREEMENTS",
    "ANSWER", "SUM", "MASKED_HEAD", "SUM_HEAD", "count_values", "hexadecimal", "mapping",
    "open_message", "write_message",
]  # fmt: skip

KEYS, ROSTER, SHARES, INBOX, MASKED, SURVIVORS, AGREED, AGREEMENTS, ANSWER, SUM = range(1, 11)
_NAMES = {
    KEYS: "a client's keys", ROSTER: "the list of keys", SHARES: "a client's shares",
    INBOX: "the shares for one client", MASKED: "masked values", SURVIVORS: "the survivors",
    AGREED: "a client's agreement", AGREEMENTS: "the list of agreements",
    ANSWER: "a client's answer", SUM: "a sum",
}  # fmt: skip
_OF_SERVER = {ROSTER, INBOX, SURVIVORS, AGREEMENTS, SUM}
SERVER = "server"
MAGIC, VERSION = b"VGMA", 1
_HEAD = struct.Struct(">4sBB32sB")
_PROOF = 64
MASKED_HEAD = struct.Struct(">dQ")  # weight, values that were clipped
SUM_HEAD = struct.Struct(">dH")  # weight, clients


def write_message(
    kind: int,
    sender: str,
    body: bytes | tuple[bytes | memoryview, ...],
    binding: bytes,
    signing: SigningKey,
) -> bytes:
    """Return the bytes of a message, signed. A body in parts is joined here, and copied once."""
    name, parts = check_id(sender), body if isinstance(body, tuple) else (body,)
    content = (_HEAD.pack(MAGIC, VERSION, kind, binding, len(name)), name, *parts)
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    return b"".join((*content, signing.sign(digest.digest())))


def count_values(data: bytes) -> int | None:
    """Return how many masked values a message holds, unchecked; None where it is of another kind.

    A sum is of another kind: its values are plain.
    """
    if len(data) < _HEAD.size:
        return None
    _, _, kind, _, size = _HEAD.unpack_from(data)
    rest = len(data) - _HEAD.size - size - MASKED_HEAD.size - _PROOF
    return rest // 4 if kind == MASKED and rest >= 0 else None


def open_message(
    data: object, kind: int, terms: Terms, binding: bytes
) -> tuple[str, bytes | memoryview]:
    """Check a message in full; return its sender and body; values are not copied.

    Raises:
        Rejected: `cause` is one of type, oversize, truncated, magic, version, kind, round, client,
            signature.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise Rejected("type", f"{type(data).__name__} where {_NAMES[kind]} were due as bytes")
    most = 4096 + 4 * terms.manifest.values
    if kind not in (MASKED, SUM):
        most = 4096 * (2 + len(terms.identities))
    if memoryview(data).nbytes > most:
        raise Rejected("oversize", f"{memoryview(data).nbytes} bytes where {most} are the most")
    data = bytes(data)
    if len(data) < _HEAD.size + 1 + _PROOF:
        raise Rejected("truncated", f"{len(data)} bytes where {_NAMES[kind]} were due")
    magic, version, found, bound, size = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise Rejected("magic", "bytes that are no message of masked aggregation")
    if version != VERSION:
        raise Rejected("version", f"wire version {version} where {VERSION} was due")
    if found != kind:
        raise Rejected("kind", f"{_NAMES.get(found, 'another kind')} where {_NAMES[kind]} was due")
    if bound != binding:
        raise Rejected("round", "a message of another run, round, base or of other terms")
    start, end = _HEAD.size + size, len(data) - _PROOF
    if start > end:
        raise Rejected("truncated", "a sender that does not fit")
    try:
        sender = data[_HEAD.size : start].decode()
    except UnicodeDecodeError as error:
        raise Rejected("client", "a sender that is no text") from error
    if kind in _OF_SERVER:
        key = terms.server if sender == SERVER else None
    else:
        key = terms.identities.get(sender)
    if key is None:
        raise Rejected("client", f"a message of {sender!r:.80}, who has no place in it")
    digest = hashlib.sha256(memoryview(data)[:end]).digest()
    try:
        verify(key, digest, data[end:])
    except Rejected as error:
        raise Rejected("signature", f"{_NAMES[kind]} that {sender} did not sign") from error
    values = memoryview(data)[start:end]
    return sender, values if kind in (MASKED, SUM) else bytes(values)


def mapping(body: bytes | memoryview, keys: set[str] | None = None) -> Mapping[str, Any]:
    """Read a JSON object, with exactly these keys where they are given.

    Raises:
        Rejected: It is something else.
    """
    try:
        found = parsed_json(bytes(body))
    except (ValueError, InputError) as error:
        raise Rejected("body", f"a body that is no JSON ({type(error).__name__})") from error
    if not isinstance(found, dict) or (keys is not None and found.keys() != keys):
        raise Rejected("body", "a body of another form")
    return found


def hexadecimal(text: object, size: int | None = None) -> bytes:
    """Read lower-case hexadecimal digits, of so many bytes.

    Raises:
        Rejected: It is something else.
    """
    if not isinstance(text, str) or len(text) % 2 or not re.fullmatch("[0-9a-f]*", text):
        raise Rejected("body", "a field that is no hexadecimal text")
    if size is not None and len(text) != 2 * size:
        raise Rejected("body", f"a field of {len(text) // 2} bytes where {size} were due")
    return bytes.fromhex(text)
