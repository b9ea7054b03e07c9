"""One round of a client, and its encrypted form for the time between two messages."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vitguard.defenses.encryption.secret import Secret
from vitguard.errors import Rejected
from vitguard.files import parsed_json

__all__ = ["RoundState", "read_state", "write_state"]

_NONCE = 12


@dataclass
class RoundState:
    """What a client knows of the round it is in; `weight` is None until its values are made."""

    binding: bytes
    weight: float | None
    transport: Secret[bytes]  # seeds: of the key for shares, of the pairwise masks, of its own
    pairs: Secret[bytes]
    own: Secret[bytes]
    keys: bytes = b""
    phase: str = "keys"
    roster: dict[str, dict[str, bytes]] = field(default_factory=dict)
    roster_digest: bytes = b""
    kept: Secret[bytes] = field(default_factory=lambda: Secret(b""))
    inbox: dict[str, bytes] = field(default_factory=dict)
    survivors: tuple[str, ...] = ()
    begun: int | None = None  # the journal's number of it; None where no journal gave one


def write_state(last: int, now: RoundState | None, key: Secret[bytes], about: bytes) -> bytes:
    """Return the last round and the one that is open, encrypted; `about` must be said again."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    plain = None if now is None else {f.name: _plain(getattr(now, f.name)) for f in fields(now)}
    content = json.dumps({"last": last, "now": plain}).encode()
    nonce = secrets.token_bytes(_NONCE)
    return nonce + ChaCha20Poly1305(key.reveal()).encrypt(nonce, content, about)


def read_state(data: object, key: Secret[bytes], about: bytes) -> tuple[int, RoundState | None]:
    """Read what `write_state` made.

    Raises:
        Rejected: It was changed, or belongs to another client or run.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        if not isinstance(data, bytes) or len(data) < _NONCE:
            raise ValueError("no state")
        cipher = ChaCha20Poly1305(key.reveal())
        stored = parsed_json(cipher.decrypt(data[:_NONCE], data[_NONCE:], about))
        last, plain = stored["last"], stored["now"]
        return last, None if plain is None else _round(plain)
    except (InvalidTag, KeyError, TypeError, ValueError) as error:
        problem = type(error).__name__
    raise Rejected("state", f"another state of a client ({problem})", "what it wrote itself")


def _plain(value: Any) -> Any:
    if isinstance(value, Secret):
        return value.reveal().hex()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return value


def _round(plain: dict[str, Any]) -> RoundState:
    def raw(name: str) -> bytes:
        return bytes.fromhex(plain[name])

    return RoundState(
        raw("binding"),
        plain["weight"],
        *(Secret(raw(name)) for name in ("transport", "pairs", "own")),
        keys=raw("keys"),
        phase=plain["phase"],
        roster={
            client: {kind: bytes.fromhex(text) for kind, text in keys.items()}
            for client, keys in plain["roster"].items()
        },
        roster_digest=raw("roster_digest"),
        kept=Secret(raw("kept")),
        inbox={client: bytes.fromhex(text) for client, text in plain["inbox"].items()},
        survivors=tuple(plain["survivors"]),
        begun=plain.get("begun"),  # states of older releases have none
    )
