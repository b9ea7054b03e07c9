"""Authentication keys: who may send as whom. They read nothing."""

from __future__ import annotations

import hmac
import json
from typing import NoReturn

from vitguard.errors import Rejected

__all__ = ["Authority"]


class Authority:
    """Keys of the message authentication codes: one for each client and one for the server.

    Whoever holds the master can make them all; a client may be given only its own and the server's.
    """

    def __init__(self, master: bytes | None, known: dict[str, bytes] | None = None) -> None:
        self._master = master
        self._known = dict(known or {})

    def __repr__(self) -> str:
        return "Authority()"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are not pickled: save them with KeySet.save")

    def key(self, who: str) -> bytes:
        """Return the key of `client:<id>` or `server`.

        Raises:
            Rejected: This party does not have it.
        """
        if self._master is not None:
            return hmac.digest(self._master, who.encode(), "sha256")
        if who not in self._known:
            raise Rejected("key", f"a message of {who}, whose authentication key is not held here")
        return self._known[who]

    def only(self, *who: str) -> Authority:
        """Return an authority that can act for `who` alone."""
        return Authority(None, {w: self.key(w) for w in who})

    def to_bytes(self) -> bytes:
        """Return everything it holds: secret."""
        known = {w: k.hex() for w, k in self._known.items()}
        master = None if self._master is None else self._master.hex()
        return json.dumps({"master": master, "known": known}).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Authority:
        """Read what `to_bytes` wrote."""
        stored = json.loads(data)
        master = stored["master"]
        return Authority(
            None if master is None else bytes.fromhex(master),
            {w: bytes.fromhex(k) for w, k in stored["known"].items()},
        )
