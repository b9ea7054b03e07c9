"""Key files and manifests: changed by strangers, and by who has the passphrase."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fuzzing.mutations import Chance, Fault
from vitguard.defenses.encryption import KeySet, Manifest, ServerKeys, SigningKey, keyfile
from vitguard.defenses.encryption.backend import shared_engine
from vitguard.defenses.encryption.secret import Secret
from vitguard.errors import VitguardError

__all__ = ["KeyFiles", "Manifests"]

PASSPHRASE = "a passphrase"


def cheap(passphrase: Secret[str], salt: bytes, cost: int) -> Secret[bytes]:
    """Stand in for scrypt, which would take all the time; costs are checked before it."""
    return Secret(
        hashlib.sha256(salt + cost.to_bytes(8, "big") + passphrase.reveal().encode()).digest()
    )


class KeyFiles:
    """Files of clients', server's and signing keys; by strangers and by who has the passphrase."""

    def __init__(self, folder: Path) -> None:
        keyfile._derived = cheap  # type: ignore[assignment]
        self.path = folder / "keys"
        signing = SigningKey.generate()
        keys = KeySet.generate(server=signing.public_bytes())
        self.things: list[Any] = [keys, keys.for_client("a"), keys.for_server(), signing]
        self.honest = []
        for thing in self.things:
            thing.save(self.path, PASSPHRASE, overwrite=True)
            self.honest.append(self.path.read_bytes())

    @staticmethod
    def content(thing: Any) -> tuple[Any, ...]:
        """All that a key holds."""
        if isinstance(thing, SigningKey):
            return (thing.public_bytes(), thing.sign(b""))
        known = (thing._facts, thing.authority.to_json().reveal())
        if isinstance(thing, ServerKeys):
            return known
        secret = shared_engine(thing.layout).secret_bytes(thing.open(shared_engine(thing.layout)))
        return (*known, thing.server, secret.reveal())

    def tried(self, thing: Any, data: bytes) -> str:
        """Load a changed file."""
        with open(self.path, "wb") as file:
            file.write(data)
        try:
            loaded = type(thing).load(self.path, PASSPHRASE)
        except VitguardError:
            return "refused"
        return "same" if self.content(loaded) == self.content(thing) else "other"

    def stranger(self, chance: Chance) -> str:
        """A file changed by someone without the passphrase."""
        at = chance.randrange(len(self.things))
        if chance.random() < 0.7:
            data = chance.json(json.loads(self.honest[at])).encode("utf-8", "surrogatepass")
        else:
            data = chance.flip(self.honest[at], self.honest)
        if data == self.honest[at]:
            return "same"
        ended = self.tried(self.things[at], data)
        others = [o for o in self.honest if o == data]
        if ended == "other" and not others:
            raise Fault("a changed key file was loaded")
        return ended

    def owner(self, chance: Chance) -> str:
        """A file changed within, by who has the passphrase."""
        at = chance.randrange(len(self.things))
        stored = json.loads(self.honest[at])
        sealed = base64.b64decode(stored.pop("secret"))
        salt, nonce = bytes.fromhex(stored["salt"]), bytes.fromhex(stored["nonce"])
        cipher = AESGCM(cheap(Secret(PASSPHRASE), salt, stored["n"]).reveal())
        plain = cipher.decrypt(nonce, sealed, json.dumps(stored, sort_keys=True).encode())
        if chance.random() < 0.3:
            facts = {k: v for k, v in stored.items() if k not in ("salt", "nonce", "n", "kind")}
            stored = {k: v for k, v in stored.items() if k not in facts}
            stored |= chance.nodes(facts)
        else:
            plain = self.within(chance, plain)
        associated = json.dumps(stored, sort_keys=True).encode()
        again = cipher.encrypt(nonce, plain, associated)
        data = json.dumps({**stored, "secret": base64.b64encode(again).decode()}).encode()
        ended = self.tried(self.things[at], data)
        if ended == "other":  # it must be a key that works as any other
            thing = type(self.things[at]).load(self.path, PASSPHRASE)
            thing.save(self.path, PASSPHRASE, overwrite=True)
            again = type(thing).load(self.path, PASSPHRASE)
            if self.content(again) != self.content(thing):
                raise Fault("keys that change when they are saved")
        return ended

    @staticmethod
    def within(chance: Chance, plain: bytes) -> bytes:
        """Change the plain content: JSON, bytes, or the secret key's own stream."""
        kind, inner = chance.random(), json.loads(plain)
        if kind < 0.3:
            return chance.json(inner).encode("utf-8", "surrogatepass")
        if kind < 0.5:
            return chance.flip(plain, [plain])
        name = chance.choice(list(inner))
        if name == "secret":
            key = bytearray(base64.b64decode(inner["secret"]))
            at = chance.choice((chance.randrange(110), chance.randrange(len(key))))
            size = chance.choice((1, 2, 8))
            key[at : at + size] = chance.randbytes(size)
            inner["secret"] = base64.b64encode(key).decode()
        elif name == "authority":
            inner["authority"] = chance.json(json.loads(inner["authority"]))
        else:
            inner[name] = chance.json({"x": inner[name]})
        return json.dumps(inner).encode()

    def close(self) -> None:
        """Nothing is left to check."""


class Manifests:
    """Manifests as JSON: what is accepted is told apart by its digest."""

    def __init__(self, folder: Path) -> None:
        tensors = {"w": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.float64)}
        self.honest = Manifest.of(tensors, bounds=0.5, max_weight=3.0)
        self.text = self.honest.to_json()

    def tried(self, chance: Chance) -> str:
        """Read a changed manifest."""
        if chance.random() < 0.8:
            text = chance.json(json.loads(self.text))
        else:
            text = chance.flip(self.text.encode(), [self.text.encode()]).decode(errors="replace")
        try:
            read = Manifest.from_json(text)
        except VitguardError:
            return "refused"
        if read == self.honest and read.digest() == self.honest.digest():
            return "same"
        plain = json.loads(text)
        said = [(e["name"], tuple(e["shape"]), e["bound"], e["double"]) for e in plain["entries"]]
        held = [(e.name, e.shape, e.bound, e.double) for e in read.entries]
        if said != held or (plain["max_weight"], plain["run"]) != (read.max_weight, read.run):
            raise Fault("a manifest that says something else than its text")
        if read.digest() == self.honest.digest() or Manifest.from_json(read.to_json()) != read:
            raise Fault("a changed manifest with the digest of the honest one")
        return "other"

    def close(self) -> None:
        """Nothing is left to check."""
