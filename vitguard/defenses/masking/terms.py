"""What all parties of a masked run agree on before the first round; all of it is public."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from vitguard.defenses.encryption.authority import check_id
from vitguard.defenses.encryption.manifest import Manifest
from vitguard.defenses.encryption.signing import check_public
from vitguard.errors import InputError, expected
from vitguard.files import parsed_json
from vitguard.numbers import plain_number

__all__ = ["Terms", "check_terms"]

_MOST_CLIENTS = 1024
_HALF = 2**31 - 1  # the largest magnitude of a sum, modulo 2^32


class _Fixed(Mapping[str, bytes]):
    """A mapping that stays as it is: messages are bound to the digest of what it holds."""

    def __init__(self, items: Mapping[str, bytes]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> bytes:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class Terms:
    """The manifest, who takes part, and how many must answer.

    Whoever sets up the clients makes the terms and gives them to all parties unchanged. The public
    identity keys in them are what a client trusts: if the *server* chooses them, it can pose as
    every other client and read each update.

    Args:
        manifest: Tensors and bounds; the same for all.
        identities: Ed25519 public key of each client, 32 bytes, by client id; 3 to 1024 clients.
        server: The server's verification key, `SigningKey.public_bytes`.
        threshold: Clients that must answer in each phase, and shares that rebuild a secret. The
            default is the smallest above two thirds of all clients; it must be above one half.

    Guarantees:
        Up to `colluding` clients together with a server that breaks every rule cannot make two
        sets of survivors be answered in one round.
    """

    manifest: Manifest
    identities: Mapping[str, bytes]
    server: bytes
    threshold: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.manifest, Manifest):
            raise expected("a Manifest", type(self.manifest).__name__)
        if not isinstance(self.identities, Mapping):
            raise expected(
                "the public key of each client by its id", type(self.identities).__name__,
                "Give a dictionary: {name: key.public_bytes(), ...}.",
            )  # fmt: skip
        if not 3 <= len(self.identities) <= _MOST_CLIENTS:
            raise expected(
                f"3 to {_MOST_CLIENTS} clients with an identity key each", len(self.identities),
                "Of a sum of two, each knows the other's update.",
            )  # fmt: skip
        for client, key in self.identities.items():
            check_id(client)
            check_public(key)
        check_public(self.server)
        if len({*self.identities.values(), self.server}) <= len(self.identities):
            raise expected("a different key for each client and the server", "one key twice")
        ordered = {c: self.identities[c] for c in sorted(self.identities)}
        object.__setattr__(self, "identities", _Fixed(ordered))
        count = len(ordered)
        if self.threshold == 0:
            object.__setattr__(self, "threshold", 2 * count // 3 + 1)
        if type(self.threshold) is not int or not count // 2 < self.threshold <= count:
            raise expected(
                f"a threshold above half of {count} clients and up to all of them", self.threshold
            )

    @property
    def clients(self) -> tuple[str, ...]:
        """Ids of all clients, in order."""
        return tuple(self.identities)

    @property
    def levels(self) -> int:
        """Largest integer of one client: as many as there are clients cannot wrap around."""
        return _HALF // len(self.identities)

    @property
    def colluding(self) -> int:
        """Clients that may work with a dishonest server before the guarantees fall."""
        return 2 * self.threshold - len(self.identities) - 1

    def to_json(self) -> str:
        """Return the terms as JSON; nothing in them is secret."""
        return json.dumps(
            {
                "manifest": json.loads(self.manifest.to_json()),
                "identities": {c: k.hex() for c, k in self.identities.items()},
                "server": self.server.hex(),
                "threshold": self.threshold,
            }
        )

    @staticmethod
    def from_json(text: str | bytes) -> Terms:
        """Read what `to_json` wrote.

        Raises:
            InputError: It is something else.
        """
        try:
            stored = parsed_json(text)
            if stored.keys() != {"manifest", "identities", "server", "threshold"}:
                raise KeyError("fields")
            if not stored["threshold"]:
                raise ValueError("no threshold, which would be chosen anew")
            return Terms(
                Manifest.from_json(json.dumps(stored["manifest"])),
                {c: bytes.fromhex(k) for c, k in stored["identities"].items()},
                bytes.fromhex(stored["server"]),
                stored["threshold"],
            )
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise expected("terms of a masked run as JSON", type(error).__name__) from error

    @cached_property
    def _digest(self) -> bytes:
        stated = {
            "manifest": self.manifest.digest().hex(),
            "identities": {c: k.hex() for c, k in self.identities.items()},
            "server": self.server.hex(),
            "threshold": self.threshold,
        }
        return hashlib.sha256(b"vitguard masks, terms\0" + json.dumps(stated).encode()).digest()

    def binding(self, round_id: int, base: str) -> bytes:
        """Return 32 bytes that every message of one round must carry.

        Raises:
            InputError: The round is no whole number from 0, or the base no text.
        """
        if type(round_id) is not int or not 0 <= round_id < 2**63:
            raise expected("a whole round number of at least 0", repr(round_id)[:80])
        if not isinstance(base, str):
            raise expected("the version of the public model as text", repr(base)[:80])
        version = hashlib.sha256(base.encode("utf-8", "surrogatepass")).digest()
        return hashlib.sha256(self._digest + round_id.to_bytes(8, "big") + version).digest()

    def check_weight(self, weight: object) -> float:
        """Return a weight that the manifest allows.

        Raises:
            InputError: It is another.
        """
        from vitguard.defenses.encryption.manifest import LIGHTEST

        most, weight = self.manifest.max_weight, plain_number(weight)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise expected(f"a weight above 0 and up to {most}", repr(weight)[:80])
        if not LIGHTEST * most <= weight <= most:
            raise expected(f"a weight from {LIGHTEST * most:g} to {most}", weight)
        return float(weight)


def check_terms(given: object) -> Terms:
    """Return terms if they are some.

    Raises:
        InputError: They are something else, such as their JSON.
    """
    if not isinstance(given, Terms):
        raise expected(
            "the Terms of the run", type(given).__name__, "Terms.from_json reads their text."
        )
    return given
