"""Masked aggregation beside the encryption's `quantised`: processor time, one thread, ViT sizes.

    python benchmarks/masking.py [--clients 10] [--repetitions 3]

The update has as many values as `vit_tiny_patch16_224` (5.7 million). Times are the best of
repetitions; masking grows with the number of clients, so it is stated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from vitguard.defenses.encryption import (
    Aggregator,
    Decryptor,
    Encryptor,
    KeySet,
    Manifest,
    SigningKey,
)
from vitguard.defenses.masking import MaskingClient, MaskingServer, Terms

VALUES = 5_717_416


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def masks(update: dict, manifest: Manifest, count: int, lost: int) -> tuple[list[float], int, int]:
    """One round in which `lost` clients are silent after they shared keys."""
    names = [f"c{n:03d}" for n in range(count)]
    identities = {c: SigningKey.generate() for c in names}
    signing = SigningKey.generate()
    public = {c: k.public_bytes() for c, k in identities.items()}
    terms = Terms(manifest, public, signing.public_bytes())
    clients = {c: MaskingClient(terms, k, client_id=c) for c, k in identities.items()}
    server = MaskingServer(terms, signing=signing, round_id=0)
    for client in clients.values():
        server.add_keys(client.start_round(0))
    roster = server.roster()
    for client in clients.values():
        server.add_shares(client.share_keys(roster))
    for name, client in clients.items():
        client.take_shares(server.inbox(name))
    there, mask_times, add_times, up = names[lost:], [], [], 0
    for name in there:
        seconds, message = timed(lambda name=name: clients[name].mask(update))
        mask_times.append(seconds)
        seconds, _ = timed(lambda message=message: server.add_masked(message))
        add_times.append(seconds)
        up = len(message)
    survivors = server.survivors()
    for name in there:
        server.add_agreement(clients[name].agree(survivors))
    agreements = server.agreements()
    for name in there:
        server.add_answer(clients[name].answer(agreements))
    unmask, total = timed(server.finish)
    return [min(mask_times), min(add_times), unmask], up, len(total)


def ckks(update: dict, manifest: Manifest, count: int) -> tuple[list[float], int, int]:
    signing = SigningKey.generate()
    keys = KeySet.generate(max_clients=10, server=signing.public_bytes())
    encryptor = Encryptor(keys, manifest, client_id="a")
    encrypt, message = timed(lambda: encryptor.encrypt(update, round_id=0))
    aggregator = Aggregator(keys.for_server(), manifest, signing=signing, round_id=0)
    aggregator.add(message)
    other = Encryptor(keys, manifest, client_id="b").encrypt(update, round_id=0)
    add, _ = timed(lambda: aggregator.add(other))
    total = aggregator.finish()
    opener = Decryptor(keys, manifest)
    decrypt, _ = timed(lambda: opener.decrypt(total, round_id=0))
    return [encrypt, add, decrypt], len(message), len(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--values", type=int, default=VALUES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    update = {"w": 0.1 * (torch.rand(options.values) * 2 - 1)}
    manifest = Manifest.of(update, bounds=0.1)
    print(f"{options.values:,} values, {options.clients} clients, one thread, M values/s")
    rows = {
        "masks": lambda: masks(update, manifest, options.clients, 0),
        "masks, 2 lost": lambda: masks(update, manifest, options.clients, 2),
        "quantised": lambda: ckks(update, manifest, options.clients),
    }
    for name, call in rows.items():
        runs = [call() for _ in range(options.repetitions)]
        best = [min(column) for column in zip(*(r[0] for r in runs), strict=True)]
        speeds = " ".join(f"{options.values / s / 1e6:8.2f}" for s in best)
        up, down = (runs[0][n] / options.values for n in (1, 2))
        print(f"{name:14} {speeds}   {up:.2f} up {down:.2f} down bytes a value")


if __name__ == "__main__":
    main()
