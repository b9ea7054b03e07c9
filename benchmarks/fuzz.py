"""Mutations of everything that is read from others: nothing changed is accepted, nothing crashes.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --count 500000   # about half an hour of one core
    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --seconds 600 --only checkpoint  # of processor time

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
import collections
import itertools
import json
import math
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from fuzzing.files import Checkpoints, Updates
from fuzzing.keys import KeyFiles, Manifests
from fuzzing.masks import Masked
from fuzzing.messages import Messages
from fuzzing.mutations import Chance, Fault
from fuzzing.records import installed
from fuzzing.states import CommandLines, States, Stored

from vitguard.defenses.encryption import keyfile

KINDS: dict[str, tuple[type, str, float]] = {  # name: class, method, share of all tries
    "message": (Messages, "outsider", 0.12),
    "message of an insider": (Messages, "insider", 0.1),
    "sum": (Messages, "without_signature", 0.1),
    "sum of the server": (Messages, "signed", 0.08),
    "key file": (KeyFiles, "stranger", 0.1),
    "key file of its owner": (KeyFiles, "owner", 0.08),
    "manifest": (Manifests, "tried", 0.1),
    "update": (Updates, "tried", 0.08),
    "checkpoint, safetensors": (Checkpoints, "safetensors", 0.05),
    "checkpoint, torch": (Checkpoints, "torch_file", 0.05),
    "masked message": (Masked, "outsider", 0.02),
    "masked message of an insider": (Masked, "insider", 0.02),
    "masked sum": (Masked, "told", 0.02),
    "progress": (States, "kept", 0.04),
    "state of a guard": (States, "spent", 0.02),
    "what a run keeps": (Stored, "tried", 0.02),
    "command line": (CommandLines, "tried", 0.02),
    **installed(),
}


def batch(
    count: int, seed: int, only: Collection[str] = (), seconds: float = math.inf
) -> dict[str, dict[str, int]]:
    """Try `count` mutations in this process; return how each kind ended, faults by their text.

    Args:
        only: Kinds whose name holds one of these words, which share the tries; all where it is
            empty.
        seconds: Processor time after which no further try begins.
    """
    kinds = {n: k for n, k in KINDS.items() if not only or any(word in n for word in only)}
    whole = sum(share for *_, share in kinds.values()) if only else 1.0
    end = time.process_time() + seconds
    found: dict[str, dict[str, int]] = {}
    before = keyfile._derived
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    try:
        with tempfile.TemporaryDirectory(dir=memory) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for path in ("keys",):
                os.close(os.open(os.path.join(folder, path), os.O_CREAT, 0o600))
            worlds: dict[type, Any] = {}
            for name, (kind, method, share) in kinds.items():
                chance = Chance(f"{seed} {name}")
                world = worlds.get(kind) or worlds.setdefault(kind, kind(Path(folder)))
                counts = collections.Counter()
                for number in range(round(count * share / whole)):
                    if time.process_time() > end:
                        break
                    try:
                        counts[getattr(world, method)(chance)] += 1
                    except Exception as error:  # noqa: BLE001 - any is the fault that is looked for
                        where = f"{type(error).__name__}: {error}"[:160]
                        counts[f"FAULT seed {seed} try {number}: {where}"] += 1
                try:
                    world.close()
                except Fault as error:
                    counts[f"FAULT seed {seed} at the end: {error}"] += 1
                found[name] = dict(counts)
    finally:
        keyfile._derived = before
    return found


def batch_in_child(
    count: int, seed: int, only: Collection[str], seconds: float
) -> dict[str, dict[str, int]]:
    """Run a batch in a forked child; how it ended is counted if it crashed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as out:
            json.dump(batch(count, seed, only, seconds), out)
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
    parser.add_argument("--only", nargs="+", default=(), help="kinds whose name has such a word")
    parser.add_argument("--seconds", type=float, help="processor time, in place of --count")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, found = time.perf_counter(), collections.defaultdict(collections.Counter)
    whole, left, done = options.seconds is None, options.seconds or math.inf, 0
    for number in itertools.count():
        count = min(options.batch, options.count - done) if whole else options.batch
        if count <= 0 or left <= 0:
            break
        spent = _children()
        for name, counts in batch_in_child(
            count, options.seed + number, options.only, left
        ).items():
            found[name].update(counts)
        left, done = left - (_children() - spent), done + count
        print(f"\r{done:,}", end="", file=sys.stderr)
    print(f"\n{'':30s}{'tries':>9s}{'refused':>9s}{'same':>7s}{'other':>7s}{'FAULTS':>8s}")
    faults = []
    for name, counts in found.items():
        bad = {k: v for k, v in counts.items() if k.startswith("FAULT")}
        faults += [f"{name}: {k} ({v})" for k, v in bad.items()]
        row = [sum(counts.values()), *(counts[k] for k in ("refused", "same", "other"))]
        print(f"{name:30s}{row[0]:9,}{row[1]:9,}{row[2]:7,}{row[3]:7,}{sum(bad.values()):8,}")
    total = sum(sum(c.values()) for c in found.values())
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"{total:,} tries, {len(faults)} faults, {time.perf_counter() - start:.0f} s, "
        f"{_children():.0f} s of processor time, largest process {largest:.0f} MiB"
    )
    print("\n".join(faults[:50]))
    raise SystemExit(bool(faults))


def _children() -> float:
    """Return the processor time of the batches so far, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
