"""Authentication keys: who may send as whom. They read nothing, but they are secret."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from vitguard.defenses.encryption.secret import Secret
from vitguard.errors import Rejected, expected
from vitguard.files import parsed_json

__all__ = ["LONGEST_ID", "Authority", "check_id"]

_CLIENT = "client:"
LONGEST_ID = 64
"""Bytes of the longest client id."""


def check_id(client_id: str) -> bytes:
    """Return the bytes of a client id.

    Raises:
        InputError: It is no text, empty, or longer than 64 bytes.
    """
    try:
        encoded = client_id.encode()
    except (AttributeError, UnicodeEncodeError):
        encoded = b""
    if not 0 < len(encoded) <= LONGEST_ID:
        raise expected(f"a client id of 1 to {LONGEST_ID} bytes", repr(client_id)[:80])
    return encoded


class Authority:
    """Keys of the clients' message authentication codes.

    Whoever holds the master can make them all: that is who sets up the clients, and the server,
    which checks them. A client is given its own alone.
    """

    def __init__(
        self, master: Secret[bytes] | None, known: Mapping[str, Secret[bytes]] | None = None
    ) -> None:
        self._master = master
        self._known = dict(known or {})

    def __repr__(self) -> str:
        return "Authority()"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are not pickled: save them with KeySet.save")

    def __deepcopy__(self, memo: dict[int, Any]) -> Authority:
        return self

    @property
    def complete(self) -> bool:
        """Whether it holds the keys of all clients."""
        return self._master is not None

    def code(self, client_id: str, digest: bytes) -> bytes:
        """Return the authentication code of a client's message, 32 bytes.

        Raises:
            Rejected: The key of this client is not held here.
        """
        return hmac.digest(self._key(_CLIENT + client_id).reveal(), digest, "sha256")

    def only(self, client_id: str) -> Authority:
        """Return an authority that can act for this client alone.

        Raises:
            InputError: It is no client id.
        """
        check_id(client_id)
        who = _CLIENT + client_id
        return Authority(None, {who: self._key(who)})

    def to_json(self) -> Secret[str]:
        """Return everything it holds."""
        return Secret(
            json.dumps(
                {
                    "master": None if self._master is None else self._master.reveal().hex(),
                    "known": {w: k.reveal().hex() for w, k in self._known.items()},
                }
            )
        )

    @staticmethod
    def from_json(text: Secret[str]) -> Authority:
        """Read what `to_json` wrote; keys of others than clients, as in old files, are dropped.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: It is something else.
        """
        stored = Secret(parsed_json(text.reveal()))
        known = {
            who: _key(key)
            for who, key in stored.reveal()["known"].items()
            if who.startswith(_CLIENT)
        }
        whole = stored.reveal()["master"] is not None
        return Authority(_key(stored.reveal()["master"]) if whole else None, known)

    def _key(self, who: str) -> Secret[bytes]:
        if self._master is not None:
            return Secret(hmac.digest(self._master.reveal(), who.encode(), "sha256"))
        if who not in self._known:
            raise Rejected("key", f"a message of {who}, whose authentication key is not held here")
        return self._known[who]


def _key(text: str) -> Secret[bytes]:
    key = Secret(bytes.fromhex(text))
    if len(key.reveal()) != 32:
        raise ValueError("a key of another length")
    return key
