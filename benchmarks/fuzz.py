"""Mutations of everything that is read from others: nothing changed is accepted, nothing crashes.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --count 500000   # about half an hour of one core

Each try changes one honest input with its structure in mind: fields, counts, lengths, numbers that
are not finite, cuts, swapped sections, bit flips, types, deep nesting, compression. Insiders prove
what they changed: a client with its key, the server with its own, the owner of a key file with the
passphrase. A try ends in one of four ways:

    refused    a typed error of vitguard
    same       accepted, and every value is that of the honest input
    other      accepted as another honest input, which a file without a key cannot rule out (a
               checkpoint with another weight) or which its writer may say (a client's own
               weight): an independent reader sees the same values in it
    FAULT      anything else; the program ends with status 1

Batches run in child processes, so that a crash is counted and not suffered.
"""

from __future__ import annotations

import argparse
import base64
import collections
import copy
import hashlib
import io
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors.torch import save as safetensors_bytes

from vitguard.core import Update
from vitguard.defenses.encryption import (
    Aggregator,
    Decryptor,
    Encryptor,
    KeySet,
    Manifest,
    ServerKeys,
    SigningKey,
    keyfile,
)
from vitguard.defenses.encryption.backend import shared_engine
from vitguard.defenses.encryption.secret import Secret
from vitguard.errors import VitguardError
from vitguard.models import AprilViT, load_checkpoint

FIELDS = {  # offset and size of each field of a message's header
    "magic": (0, 4), "version": (4, 1), "kind": (5, 1), "preset": (6, 12), "key": (18, 16),
    "manifest": (34, 32), "round": (66, 8), "base": (74, 32), "nonce": (106, 16),
    "max_clients": (122, 2), "clients": (124, 2), "weight": (126, 8), "values": (134, 8),
    "count": (142, 4), "id_size": (146, 1), "id": (147, 1), "table": (148, 4), "table2": (152, 4),
}  # fmt: skip
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, -0.0, 1e308, 5e-324, 2.0, 0.5)
COUNTS = (0, 1, 2, 3, 7, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
DEEP = "@deep@"
ODD = (
    None, True, False, -1, 0, 1, 2, 0.5, -0.0, 1e308, 2**31, 2**63, 10**400, "", "x", "x" * 100,
    "\ud800", "\0", [], {}, [[]], {"a": 1}, DEEP, *FLOATS[:3],
)  # fmt: skip
PASSPHRASE = "a passphrase"


def cheap(passphrase: Secret[str], salt: bytes, cost: int) -> Secret[bytes]:
    """Stand in for scrypt, which would take all the time; costs are checked before it."""
    return Secret(
        hashlib.sha256(salt + cost.to_bytes(8, "big") + passphrase.reveal().encode()).digest()
    )


class Chance(random.Random):
    """The mutations that know nothing of a format, and those of JSON."""

    def flip(self, data: bytes, donors: list[bytes]) -> bytes:
        """Change bytes: flip, cut, insert, zero, repeat, swap sections, join with another."""
        out = bytearray(data)
        at, other = sorted((self.randrange(len(out)), self.randrange(len(out))))
        kind = self.randrange(8)
        if kind == 0:
            for _ in range(self.choice((1, 1, 1, 2, 20))):
                out[self.randrange(len(out))] ^= 1 << self.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = self.randbytes(self.choice((1, 4, 100)))
        elif kind == 3:
            out[at:other] = bytes(other - at)
        elif kind == 4:
            out[at:other] = out[at:other] * 2
        elif kind == 5:
            middle = (at + other) // 2
            out[at:other] = out[middle:other] + out[at:middle]
        elif kind == 6:
            out[at:other] = self.choice(donors)[at:other]
        else:
            del out[at:other]
        return bytes(out)

    def json(self, thing: Any) -> str:
        """Change one to three nodes of a JSON object: value, type, name, presence, nesting."""
        text = json.dumps(self.nodes(thing))
        if self.random() < 0.05:
            text = self.choice(("[" * 20_000, '{"a":' * 20_000, text[:-1], text + ",", f"[{text}]"))
        return text.replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000)

    def nodes(self, thing: Any) -> Any:
        """Change one to three nodes; a dictionary stays one."""
        thing = copy.deepcopy(thing)
        for _ in range(self.choice((1, 1, 1, 2, 3))):
            changed = self._node(thing)
            thing = changed if isinstance(changed, dict) or not isinstance(thing, dict) else thing
        return thing

    def odd(self) -> Any:
        """Return a value that few fields expect."""
        return copy.deepcopy(self.choice(ODD))

    def _node(self, thing: Any) -> Any:
        if isinstance(thing, dict) and thing and self.random() < 0.93:
            key, kind = self.choice(list(thing)), self.random()
            if kind < 0.1:
                del thing[key]
            elif kind < 0.17:
                thing[self.choice(("x", "", "\ud800", key + "x"))] = thing.pop(key)
            elif kind < 0.22:
                thing[self.choice(("more", "version", "run"))] = self.odd()
            else:
                thing[key] = self._node(thing[key])
            return thing
        if isinstance(thing, list) and thing and self.random() < 0.85:
            at = self.randrange(len(thing))
            if self.random() < 0.1:
                thing.insert(at, thing[at])
            else:
                thing[at] = self._node(thing[at])
            return thing
        if isinstance(thing, str) and thing and self.random() < 0.5:
            at = self.randrange(len(thing))
            return thing[:at] + self.choice(("", "0", "f", "=", "?", "\ud800")) + thing[at + 1 :]
        if isinstance(thing, int | float) and self.random() < 0.3:
            near = (thing + 1, thing - 1, -thing, thing * 10**6)
            return self.choice((*near, float(thing)) if abs(thing) < 1e300 else near)
        return self.odd()


class Fault(AssertionError):
    """A mutation was accepted that changed a value."""


class Messages:
    """Messages and sums of one small run: two ciphertexts each."""

    def __init__(self, folder: Path) -> None:
        self.signing = SigningKey.generate()
        self.keys = KeySet.generate(server=self.signing.public_bytes())
        generator = torch.Generator().manual_seed(0)
        levels = self.keys.layout.levels
        self.values = {c: torch.rand(9000, generator=generator) * 2 - 1 for c in "abz"}
        self.manifest = Manifest.of({"w": self.values["a"]}, bounds=1.0, max_weight=4.0)
        self.honest = {c: self.message(c) for c in "abz"}
        self.donors = [self.message("a", 6), self.message("b", 6), self.honest["b"]]
        self.aggregator = self.adding("z")
        self.before = [self.aggregator._engine.save(c) for c in self.aggregator._total]
        self.total = self.sum("ab")
        self.sums = [self.sum("abz"), self.sum("az")]
        self.decryptor = Decryptor(self.keys, self.manifest)
        self.integers = {
            c: np.rint(v.double().numpy() * levels / 4).astype(np.int64)
            for c, v in self.values.items()
        }

    def message(self, client: str, round_id: int = 5) -> bytes:
        """An honest message."""
        encryptor = Encryptor(self.keys, self.manifest, client_id=client, rounding="nearest")
        return encryptor.encrypt({"w": self.values[client]}, round_id=round_id)

    def adding(self, clients: str) -> Aggregator:
        """An aggregator that has the messages of these clients."""
        aggregator = Aggregator(
            self.keys.for_server(), self.manifest, signing=self.signing, round_id=5
        )
        for client in clients:
            aggregator.add(self.honest[client])
        return aggregator

    def sum(self, clients: str) -> bytes:
        """An honest sum."""
        return self.adding(clients).finish()

    def mutated(self, chance: Chance, data: bytes, donors: list[bytes]) -> bytes:
        """Change a header field, the table, a ciphertext, the order, or any bytes."""
        kind, out = chance.random(), bytearray(data)
        if kind < 0.45:
            name = chance.choice(list(FIELDS))
            at, size = FIELDS[name]
            if name == "weight" and chance.random() < 0.7:
                new = struct.pack(">d", chance.choice((*FLOATS, chance.uniform(0, 9))))
            elif chance.random() < 0.5:
                new = chance.randbytes(size)
            else:
                new = (chance.choice(COUNTS) % 256**size).to_bytes(size, "big")
            out[at : at + size] = new
        elif kind < 0.75:
            start, second, end = self.places(data)
            at = chance.choice((start, second)) + chance.choice(
                (chance.randrange(130), chance.randrange(second - start))
            )
            size = chance.choice((1, 1, 2, 8, 64))
            new = chance.choice((chance.randbytes(size), bytes(size), b"\xff" * size))
            out[at : at + size] = new
            del out[len(data) :]
        elif kind < 0.8:
            start, second, end = self.places(data)
            table = FIELDS["table"][0]
            out[start:end] = data[second:end] + data[start:second]
            out[table : table + 8] = struct.pack(">II", end - second, second - start)
        else:
            return chance.flip(data, donors)
        return bytes(out)

    @staticmethod
    def places(data: bytes) -> tuple[int, int, int]:
        """Where both ciphertexts begin and the second ends."""
        table = 147 + data[146]
        first, second = struct.unpack_from(">II", data, table)
        return table + 8, table + 8 + first, table + 8 + first + second

    def outsider(self, chance: Chance) -> str:
        """A message changed by someone without a key."""
        data = self.mutated(chance, self.honest["a"], self.donors)
        if data in (self.honest["a"], *self.donors):
            return "same"
        try:
            self.aggregator.add(data)
        except VitguardError:
            return "refused"
        raise Fault("a changed message was added")

    def insider(self, chance: Chance) -> str:
        """A message changed and proved by the client that sends it."""
        data = self.mutated(chance, self.honest["a"], self.donors[:2])
        if len(data) < 200:
            return self.outsider(chance)
        body = data[:-32]
        client = body[147 : 147 + body[146]].decode(errors="replace")
        data = body + self.keys.authority.code(client, hashlib.sha256(body).digest())
        aggregator = self.adding("b")
        before = [aggregator._engine.save(c) for c in aggregator._total]
        try:
            aggregator.add(data)
        except VitguardError:
            if [aggregator._engine.save(c) for c in aggregator._total] != before:
                raise Fault("a refused message changed the sum") from None
            return "refused"
        return self.opened(aggregator.finish(), "ab")

    def without_signature(self, chance: Chance) -> str:
        """A sum changed by someone without the server's key."""
        data = self.mutated(chance, self.total, self.sums)
        if data in (self.total, *self.sums):
            return "same"
        try:
            self.decryptor.decrypt(data, round_id=5)
        except VitguardError:
            if self.decryptor.opened != -1:
                raise Fault("a forged sum used up its round") from None
            return "refused"
        raise Fault("a changed sum was opened")

    def signed(self, chance: Chance) -> str:
        """A sum changed and signed by the server."""
        data = self.mutated(chance, self.total, self.sums)
        if len(data) < 200:
            return self.without_signature(chance)
        body = data[:-64]
        return self.opened(
            body + self.signing.sign(hashlib.sha256(body).digest()), "ab", "abz", "az"
        )

    def opened(self, total: bytes, *candidates: str) -> str:
        """Open a sum and compare its integers with those of the messages in it."""
        self.decryptor._opened = -1
        try:
            mean = self.decryptor.decrypt(total, round_id=5)["w"].double().numpy()
        except VitguardError:
            return "refused"
        finally:
            self.decryptor._opened = -1
        weight = struct.unpack_from(">d", total, FIELDS["weight"][0])[0]
        found = np.rint(mean * weight / 4 * self.keys.layout.levels).astype(np.int64)
        for clients in candidates:
            if np.array_equal(found, sum(self.integers[c] for c in clients)):
                return "same" if weight == len(clients) else "other"
        raise Fault("a sum with changed values was opened")

    def close(self) -> None:
        """Check that no refused message changed the sum."""
        if [self.aggregator._engine.save(c) for c in self.aggregator._total] != self.before:
            raise Fault("a refused message changed the sum")


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


DTYPES = {
    "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip


def plainly(data: bytes) -> dict[str, np.ndarray]:
    """Read safetensors without the library; bfloat16 as its bits."""
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    read = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            kind = DTYPES.get(entry["dtype"], "u2")
            part = data[8 + size + first : 8 + size + last]
            read[name] = np.frombuffer(part, f"<{kind}" if kind != "?" else "?").reshape(
                entry["shape"]
            )
    return read


def changed_safetensors(chance: Chance, data: bytes) -> bytes:
    """Change header, metadata, lengths, types or bytes of a safetensors file."""
    kind = chance.random()
    if kind < 0.25:
        return chance.flip(data, [data])
    size = struct.unpack_from("<Q", data)[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if kind < 0.35:
        count = chance.choice((*COUNTS, size - 1, size + 1, 2**40)) % 2**64
        return struct.pack("<Q", count) + data[8:]
    if kind < 0.5:
        name = chance.choice([n for n in header if n != "__metadata__"])
        odd = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "BF16", "C64", "U16", "U64", "F6_E2M3", "X")
        header[name]["dtype"] = chance.choice((*DTYPES, *odd))
        text = json.dumps(header)
    elif kind < 0.75 and "__metadata__" in header:
        meta = header["__metadata__"]
        meta["vitguard.update"] = chance.json(json.loads(meta["vitguard.update"]))
        text = json.dumps(header)
    elif kind < 0.85:
        at = chance.randrange(len(body)) & ~3
        body = body[:at] + np.float32(chance.choice(FLOATS)).tobytes() + body[at + 4 :]
        text = json.dumps(header)
    else:
        text = chance.json(header)
    new = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(new)) + new + body


class Updates:
    """Saved updates."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "update"
        tensors = {"a.b": torch.randn(3, 2), "c": torch.randn(5, dtype=torch.float64)}
        self.honest = Update(
            tensors, "difference", 3, 2, 0.1, "sgd", 0.5, 0.01, {"s": "encrypted"}, {"p": b"\0\1"}
        )
        self.honest.save(self.path)
        self.data = self.path.read_bytes()

    def tried(self, chance: Chance) -> str:
        """Load a changed update; whatever is accepted can be saved and is what the file says."""
        data = changed_safetensors(chance, self.data)
        self.path.write_bytes(data)
        try:
            loaded = Update.load(self.path)
        except VitguardError:
            return "refused"
        held = {f"tensor:{k}": v for k, v in loaded.tensors.items()}
        held |= {f"payload:{k}": torch.tensor(list(v)).byte() for k, v in loaded.payloads.items()}
        same_values(held, plainly(data))
        loaded.save(self.path)
        again = Update.load(self.path)
        if self.content(again) != self.content(loaded):
            raise Fault("an update that changes when it is saved")
        return "same" if self.content(loaded) == self.content(self.honest) else "other"

    @staticmethod
    def content(update: Update) -> tuple[Any, ...]:
        """All that an update holds."""
        tensors = {
            k: (str(v.dtype), tuple(v.shape), v.reshape(-1).view(torch.uint8).tolist())
            for k, v in update.tensors.items()
        }
        return (
            tensors, dict(update.sealed), dict(update.payloads), update.kind, update.batch_size,
            update.local_steps, update.learning_rate, update.optimizer, update.momentum,
            update.weight_decay,
        )  # fmt: skip

    def close(self) -> None:
        """Nothing is left to check."""


def same_values(held: dict[str, torch.Tensor], read: dict[str, np.ndarray]) -> None:
    """Compare tensors with what the independent reader saw, bit for bit."""
    if held.keys() != read.keys():
        raise Fault("other names than the file has")
    for name, tensor in held.items():
        mine = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if mine != read[name].tobytes() or tuple(tensor.shape) != read[name].shape:
            raise Fault(f"{name} with other values than the file has")


class Checkpoints:
    """Checkpoints of a small model, as safetensors and as torch files."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = AprilViT(4, 2, 4, 1, 1, 2)
        self.state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.plain, self.torch = folder / "w.safetensors", folder / "w.pt"
        self.data = safetensors_bytes(self.state)
        buffer = io.BytesIO()
        torch.save(self.state, buffer)
        self.archive = buffer.getvalue()
        with zipfile.ZipFile(buffer) as archive:
            self.members = {m: archive.read(m) for m in archive.namelist()}
        buffer = io.BytesIO()
        torch.save(self.state, buffer, _use_new_zipfile_serialization=False)
        self.legacy = buffer.getvalue()

    def loaded(self, path: Path) -> bool:
        """Load into the model; refused, it is unchanged."""
        self.model.load_state_dict(self.state)
        try:
            load_checkpoint(self.model, path)
        except VitguardError:
            if not self.is_honest():
                raise Fault("a refused checkpoint changed the model") from None
            return False
        if not all(bool(v.isfinite().all()) for v in self.model.state_dict().values()):
            raise Fault("weights that are not finite were loaded")
        return True

    def is_honest(self) -> bool:
        """Whether the model has the honest weights."""
        return all(torch.equal(v, self.state[k]) for k, v in self.model.state_dict().items())

    def safetensors(self, chance: Chance) -> str:
        """A changed safetensors checkpoint."""
        data = changed_safetensors(chance, self.data)
        self.plain.write_bytes(data)
        if not self.loaded(self.plain):
            return "refused"
        if self.is_honest():
            return "same"
        read = {k: torch.from_numpy(v.copy()) for k, v in plainly(data).items()}
        for name, tensor in self.model.state_dict().items():
            kind = "BF16" if read[name].dtype == torch.uint16 else ""
            seen = read[name].view(torch.bfloat16) if kind else read[name]
            if not torch.equal(seen.to(tensor.dtype), tensor):
                raise Fault(f"{name} with other values than the file has")
        return "other"

    def torch_file(self, chance: Chance) -> str:
        """A changed torch checkpoint: its bytes, its members, its tensors, or compressed."""
        kind = chance.random()
        if kind < 0.2:
            data = chance.flip(self.archive, [self.archive, self.legacy])
        elif kind < 0.35:
            data = chance.flip(self.legacy, [self.archive, self.legacy])
        elif kind < 0.75:
            data = self.rewritten(chance)
        else:
            data = self.other_tensors(chance)
        self.torch.write_bytes(data)
        if not self.loaded(self.torch):
            return "refused"
        return "same" if self.is_honest() else "other"

    def rewritten(self, chance: Chance) -> bytes:
        """The archive with a changed, dropped, doubled, renamed or compressed member."""
        members = dict(self.members)
        name = chance.choice((*members, next(iter(members))))
        kind = chance.randrange(6)
        method = zipfile.ZIP_DEFLATED if kind == 0 else zipfile.ZIP_STORED
        if kind == 0 and chance.random() < 0.3:
            members[name] = bytes(chance.choice((10**5, 10**7)))
        elif kind == 1:
            del members[name]
        elif kind == 2:
            members[name + "x"] = members.pop(name)
        elif kind >= 3 and members[name]:
            members[name] = chance.flip(members[name], [members[name]])
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return out.getvalue()

    def other_tensors(self, chance: Chance) -> bytes:
        """A well-formed file with a tensor of another kind."""
        state: dict[Any, Any] = dict(self.state)
        name = chance.choice(list(state))
        tensor = state[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kinds: list[Callable[[], Any]] = [
                lambda: tensor.to("meta"), lambda: tensor.to_sparse(),
                lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
                lambda: tensor.to(torch.float8_e4m3fn), lambda: tensor.to(torch.float8_e5m2),
                lambda: tensor.to(torch.complex64), lambda: tensor.long(), lambda: tensor.bool(),
                lambda: tensor.double() * 1e300, lambda: tensor.half(), lambda: tensor.bfloat16(),
                lambda: tensor.double(), lambda: tensor * float("nan"), lambda: tensor[None],
                lambda: torch.zeros(1).expand(2**40), lambda: torch.zeros(1).expand(tensor.shape),
                lambda: None, lambda: "text", lambda: [tensor], lambda: {"a": tensor},
                lambda: torch.nn.Parameter(tensor), lambda: tensor.flip(0),
            ]  # fmt: skip
            state[name] = chance.choice(kinds)()
            if chance.random() < 0.1:
                state[chance.choice(("module." + name, 7, None, "x", ("a", 1)))] = tensor
            out = io.BytesIO()
            torch.save(chance.choice((state, state, {"model": state})), out)
        return out.getvalue()

    def close(self) -> None:
        """Nothing is left to check."""


KINDS: dict[str, tuple[type, str, float]] = {  # name: class, method, share of all tries
    "message": (Messages, "outsider", 0.2),
    "message of an insider": (Messages, "insider", 0.12),
    "sum": (Messages, "without_signature", 0.12),
    "sum of the server": (Messages, "signed", 0.08),
    "key file": (KeyFiles, "stranger", 0.12),
    "key file of its owner": (KeyFiles, "owner", 0.08),
    "manifest": (Manifests, "tried", 0.1),
    "update": (Updates, "tried", 0.08),
    "checkpoint, safetensors": (Checkpoints, "safetensors", 0.05),
    "checkpoint, torch": (Checkpoints, "torch_file", 0.05),
}


def batch(count: int, seed: int) -> dict[str, dict[str, int]]:
    """Try `count` mutations in this process; return how each kind ended, faults by their text."""
    found: dict[str, dict[str, int]] = {}
    before = keyfile._derived
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    try:
        with tempfile.TemporaryDirectory(dir=memory) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for path in ("keys",):
                os.close(os.open(os.path.join(folder, path), os.O_CREAT, 0o600))
            worlds: dict[type, Any] = {}
            for name, (kind, method, share) in KINDS.items():
                chance = Chance(f"{seed} {name}")
                world = worlds.get(kind) or worlds.setdefault(kind, kind(Path(folder)))
                counts = collections.Counter()
                for number in range(round(count * share)):
                    try:
                        counts[getattr(world, method)(chance)] += 1
                    except Exception as error:  # noqa: BLE001 - any is the fault that is looked for
                        where = f"{type(error).__name__}: {error}"[:160]
                        counts[f"FAULT seed {seed} try {number}: {where}"] += 1
                world.close()
                found[name] = dict(counts)
    finally:
        keyfile._derived = before
    return found


def batch_in_child(count: int, seed: int) -> dict[str, dict[str, int]]:
    """Run a batch in a forked child; how it ended is counted if it crashed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as out:
            json.dump(batch(count, seed), out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        return {"process": {f"FAULT seed {seed}: ended with {status}": 1}}
    return json.loads(text)


def main() -> None:
    """Run all batches and print how each kind ended."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=5_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, found = time.perf_counter(), collections.defaultdict(collections.Counter)
    for number in range(-(-options.count // options.batch)):
        count = min(options.batch, options.count - number * options.batch)
        for name, counts in batch_in_child(count, options.seed + number).items():
            found[name].update(counts)
        print(f"\r{min(options.count, (number + 1) * options.batch):,}", end="", file=sys.stderr)
    print(f"\n{'':26s}{'tries':>9s}{'refused':>9s}{'same':>7s}{'other':>7s}{'FAULTS':>8s}")
    faults = []
    for name, counts in found.items():
        bad = {k: v for k, v in counts.items() if k.startswith("FAULT")}
        faults += [f"{name}: {k} ({v})" for k, v in bad.items()]
        row = [sum(counts.values()), *(counts[k] for k in ("refused", "same", "other"))]
        print(f"{name:26s}{row[0]:9,}{row[1]:9,}{row[2]:7,}{row[3]:7,}{sum(bad.values()):8,}")
    total = sum(sum(c.values()) for c in found.values())
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{total:,} tries, {len(faults)} faults, {time.perf_counter() - start:.0f} s, "
        f"{usage.ru_utime + usage.ru_stime:.0f} s of processor time, "
        f"largest process {usage.ru_maxrss / 1024:.0f} MiB"
    )
    print("\n".join(faults[:50]))
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
