import hashlib

import pytest
import torch

from vitguard.defenses.encryption import (
    Aggregator,
    Decryptor,
    Encryptor,
    KeySet,
    Manifest,
    SigningKey,
)


class Run:
    """Keys, a manifest and helpers for one small run."""

    def __init__(self, preset="quantised", values=9000, max_weight=4.0, max_clients=10):
        self.signing = SigningKey.generate()
        self.keys = KeySet.generate(
            preset=preset, max_clients=max_clients, server=self.signing.public_bytes()
        )
        self.template = {"w": torch.zeros(values), "b": torch.zeros(3, 2)}
        self.manifest = Manifest.of(self.template, bounds=1.0, max_weight=max_weight)

    def tensors(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {
            k: torch.rand(t.shape, generator=generator) * 2 - 1 for k, t in self.template.items()
        }

    def message(self, client="a", seed=0, round_id=5, weight=1.0, base="v1", keys=None):
        encryptor = Encryptor(keys or self.keys, self.manifest, client_id=client)
        return encryptor.encrypt(self.tensors(seed), round_id=round_id, weight=weight, base=base)

    def aggregator(self, round_id=5, base="v1", manifest=None):
        return Aggregator(
            self.keys.for_server(),
            manifest or self.manifest,
            signing=self.signing,
            round_id=round_id,
            base=base,
        )

    def decryptor(self, **options):
        return Decryptor(self.keys, self.manifest, **options)

    def open(self, total, decryptor=None):
        return (decryptor or self.decryptor()).decrypt(total, round_id=5, base="v1")

    def prove(self, message):
        """A message with the proof of its own client: what a client with a valid key can do."""
        body = bytes(message[:-32])
        client = body[147 : 147 + body[146]].decode(errors="replace")
        return body + self.keys.authority.code(client, hashlib.sha256(body).digest())

    def sign(self, total):
        """A sum with the server's signature: what the server can do."""
        body = bytes(total[:-64])
        return body + self.signing.sign(hashlib.sha256(body).digest())

    def sum(self, clients=3):
        aggregator = self.aggregator()
        for i in range(clients):
            aggregator.add(self.message(f"c{i}", seed=i))
        return aggregator.finish()


@pytest.fixture(scope="package")
def run():
    return Run()


@pytest.fixture(scope="package")
def make_run():
    return Run
