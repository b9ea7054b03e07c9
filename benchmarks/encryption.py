"""Encrypted gradients against plain TenSEAL vectors at NVFlare's parameters, in one run.

    OMP_NUM_THREADS=1 python benchmarks/encryption.py             # the comparison, about a minute
    OMP_NUM_THREADS=1 python benchmarks/encryption.py --vit-base  # 86 M values, end to end

The peer gets all attention values of `vit_tiny_patch16_224` as one flat symmetric vector, which is
kinder to it than a vector for each layer. One thread each; processor time, the best of repetitions
that alternate, since on a shared machine what others do only ever adds time. ViT-B is wall clock.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import timm
import torch

from vitguard.defenses.encryption import (
    Aggregator,
    Decryptor,
    Encryptor,
    KeySet,
    Manifest,
    SigningKey,
    select_names,
)
from vitguard.vit import Anatomy

PEER = {"degree": 8192, "bits": [60, 40, 40], "scale": 2.0**40}  # NVFlare's HEBuilder
BOUND = 0.05
SIGNING = SigningKey.generate()


def attention_update(seed: int) -> dict[str, torch.Tensor]:
    """Random values in the shapes of ViT-tiny's attention parameters."""
    model = timm.create_model("vit_tiny_patch16_224")
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    names = select_names(Anatomy.of(model), "attention", parameters)
    draws = {n: torch.randn(parameters[n].shape, generator=generator) for n in names}
    return {n: (0.01 * t).clamp(-BOUND, BOUND) for n, t in draws.items()}


def adding(keys: KeySet, manifest: Manifest, round_id: int) -> Aggregator:
    """Return the server's side of a round."""
    return Aggregator(keys.for_server(), manifest, signing=SIGNING, round_id=round_id)


def seconds(call: Callable[[], object]) -> tuple[float, object]:
    """Return the duration of a call (wall clock) and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def work(call: Callable[[], object]) -> tuple[float, object]:
    """Return the processor time of a call and its result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


class Peer:
    """Plain TenSEAL vectors."""

    def __init__(self) -> None:
        import tenseal as ts

        self.ts = ts
        self.context = ts.context(
            ts.SCHEME_TYPE.CKKS, PEER["degree"], coeff_mod_bit_sizes=PEER["bits"],
            encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC, n_threads=1,
        )  # fmt: skip
        self.context.global_scale = PEER["scale"]
        public = self.context.serialize(save_secret_key=False)
        self.public = ts.context_from(public, n_threads=1)

    def round(self, values: np.ndarray) -> dict[str, float]:
        """One client's message, added to another and decrypted: seconds and bytes of each part."""
        ts, row = self.ts, {}
        row["encrypt"], data = work(lambda: ts.ckks_vector(self.context, values).serialize())
        total = ts.ckks_vector_from(self.public, data)
        row["load_add"], _ = work(lambda: total.add_(ts.ckks_vector_from(self.public, data)))
        other = ts.ckks_vector_from(self.public, data)
        row["add"], _ = work(lambda: total.add_(other))
        down = total.serialize()
        row["decrypt"], _ = work(
            lambda: np.array(ts.ckks_vector_from(self.context, down).decrypt())
        )
        return {**row, "up": len(data), "down": len(down)}


class Ours:
    """The same with vitguard, every check included."""

    def __init__(self, preset: str, manifest: Manifest) -> None:
        self.keys = KeySet.generate(preset=preset, server=SIGNING.public_bytes())
        self.manifest = manifest
        self.encryptors = [Encryptor(self.keys, manifest, client_id=c) for c in "ab"]

    def round(self, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        """One client's message, added to another and decrypted: seconds and bytes of each part."""
        row, (first, second) = {}, self.encryptors
        row["encrypt"], message = work(lambda: first.encrypt(tensors, round_id=0))
        aggregator = adding(self.keys, self.manifest, 0)
        aggregator.add(second.encrypt(tensors, round_id=0))
        row["load_add"], _ = work(lambda: aggregator.add(message))
        total, engine = aggregator._total, aggregator._engine
        others = [engine.load(engine.save(cipher), seeded=False) for cipher in total]
        row["add"], _ = work(lambda: [engine.add(t, o) for t, o in zip(others, total, strict=True)])
        down = aggregator.finish()
        decryptor = Decryptor(self.keys, self.manifest)
        row["decrypt"], _ = work(lambda: decryptor.decrypt(down, round_id=0))
        return {**row, "up": len(message), "down": len(down)}


def compare(preset: str, repetitions: int) -> None:
    """Print the ratios of one preset to the peer."""
    tensors = attention_update(0)
    values = torch.cat([t.flatten() for t in tensors.values()]).double().numpy()
    peer, ours = Peer(), Ours(preset, Manifest.of(tensors, bounds=BOUND))
    rows = [(peer.round(values), ours.round(tensors)) for _ in range(repetitions)]
    print(f"\n{len(values):,} values, preset {preset}, best of {repetitions}, one thread")
    labels = {
        "encrypt": "encrypt + serialise", "load_add": "server: check + load + add",
        "add": "server: add alone", "decrypt": "load + decrypt",
    }  # fmt: skip
    for key, label in labels.items():
        theirs, mine = (min(r[i][key] for r in rows) for i in (0, 1))
        rates = f"{len(values) / theirs / 1e6:7.2f} -> {len(values) / mine / 1e6:7.2f} M/s"
        print(f"  {label:28s} {rates}   {theirs / mine:5.1f} times")
    for key, label in (("up", "upload"), ("down", "download")):
        theirs, mine = (rows[0][i][key] / len(values) for i in (0, 1))
        print(f"  {label:28s} {theirs:7.2f} -> {mine:7.3f} B/v   {theirs / mine:5.1f} times")


def mismatches(clients: int = 10) -> None:
    """Print how many of the decrypted integer sums differ from the plain ones."""
    keys = KeySet.generate(max_clients=clients, server=SIGNING.public_bytes())
    levels = keys.layout.levels
    rng = np.random.default_rng(0)
    count = 1_800_000
    manifest = Manifest.of({"w": torch.zeros(count, dtype=torch.float64)}, bounds=1.0)
    aggregator = adding(keys, manifest, 0)
    total = np.zeros(count, dtype=np.int64)
    for client in range(clients):
        integers = rng.integers(-levels, levels + 1, count)
        total += integers
        tensors = {"w": torch.from_numpy(integers / levels)}
        encryptor = Encryptor(keys, manifest, client_id=str(client), rounding="nearest")
        aggregator.add(encryptor.encrypt(tensors, round_id=0))
    mean = Decryptor(keys, manifest).decrypt(aggregator.finish(), round_id=0)["w"].numpy()
    wrong = int((np.rint(mean * levels * clients).astype(np.int64) != total).sum())
    print(f"\n{wrong} mismatches in {count:,} integer sums of {clients} clients")


def memory(rounds: int = 100) -> None:
    """Print the resident memory after early and late rounds."""
    tensors = {"w": torch.rand(200_000) * 2 - 1}
    manifest = Manifest.of(tensors, bounds=1.0)
    keys = KeySet.generate(server=SIGNING.public_bytes())
    encryptors = [Encryptor(keys, manifest, client_id=c) for c in "ab"]
    decryptor = Decryptor(keys, manifest)
    seen = {}
    for number in range(rounds):
        aggregator = adding(keys, manifest, number)
        for encryptor in encryptors:
            aggregator.add(encryptor.encrypt(tensors, round_id=number))
        decryptor.decrypt(aggregator.finish(), round_id=number)
        seen[number + 1] = resident()
    marks = (10, 25, 50, 75, rounds)
    print(f"resident MB after rounds {marks}: {[round(seen[m] / 1e6, 1) for m in marks]}")


def resident() -> int:
    """Resident bytes of this process (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def vit_base(clients: int) -> None:
    """Print seconds and megabytes of all 86 M values of ViT-B, from updates to their average."""
    model = timm.create_model("vit_base_patch16_224")
    tensors = {n: 1e-3 * torch.randn(p.shape) for n, p in model.named_parameters()}
    del model
    manifest = Manifest.of(tensors, bounds=0.01)
    keys = KeySet.generate(server=SIGNING.public_bytes())
    aggregator = adding(keys, manifest, 0)
    spent = {"encrypt": 0.0, "add": 0.0}
    size = 0
    for client in range(clients):
        encryptor = Encryptor(keys, manifest, client_id=str(client))
        took, message = seconds(lambda e=encryptor: e.encrypt(tensors, round_id=0))
        spent["encrypt"], size = spent["encrypt"] + took / clients, len(message)
        took, _ = seconds(lambda m=message: aggregator.add(m))
        spent["add"] += took / clients
        del message
    spent["finish"], total = seconds(aggregator.finish)
    spent["decrypt"], mean = seconds(lambda: Decryptor(keys, manifest).decrypt(total, round_id=0))
    error = max(float((mean[n] - t).abs().max()) for n, t in tensors.items())
    print(f"ViT-B, {manifest.values:,} values, {clients} clients, preset quantised:")
    print("  " + ", ".join(f"{k} {v:.1f} s" for k, v in spent.items()))
    print(f"  {size / 1e6:.0f} MB up, {len(total) / 1e6:.0f} MB down, worst error {error:.1e}")
    print(f"  plain float32 upload: {manifest.values * 4 / 1e6:.0f} MB")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="quantised")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--vit-base", action="store_true", help="only the 86 M values of ViT-B")
    parser.add_argument("--clients", type=int, default=2, help="of --vit-base")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.vit_base:
        vit_base(options.clients)
        return
    compare(options.preset, options.repetitions)
    mismatches()
    memory()


if __name__ == "__main__":
    main()
