"""Messages and sums: changed by strangers, by a client with its key, by the server."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import torch

from fuzzing.mutations import COUNTS, FLOATS, Chance, Fault
from vitguard.defenses.encryption import (
    Aggregator,
    Decryptor,
    Encryptor,
    KeySet,
    Manifest,
    SigningKey,
)
from vitguard.errors import VitguardError

__all__ = ["FIELDS", "Messages"]

FIELDS = {  # offset and size of each field of a message's header
    "magic": (0, 4), "version": (4, 1), "kind": (5, 1), "preset": (6, 12), "key": (18, 16),
    "manifest": (34, 32), "round": (66, 8), "base": (74, 32), "nonce": (106, 16),
    "max_clients": (122, 2), "clients": (124, 2), "weight": (126, 8), "values": (134, 8),
    "count": (142, 4), "id_size": (146, 1), "id": (147, 1), "table": (148, 4), "table2": (152, 4),
}  # fmt: skip


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
