"""A Flower round with encryption beside the same round without: time, memory, accuracy.

    OMP_NUM_THREADS=1 python benchmarks/federated.py throughput [--model vit_base_patch16_224]
    OMP_NUM_THREADS=1 python benchmarks/federated.py memory --nodes 10 100 1000
    OMP_NUM_THREADS=1 python benchmarks/federated.py accuracy --examples 500 --rounds 20

Everything crosses Flower's own messages, on the grid in one process. Times are processor time of
one thread, medians of repetitions that alternate. Memory is the highest resident set of a process
of its own for each number of nodes. Accuracy is of the example's app, three seeds each.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import vitguard as vg
from vitguard.defenses.encryption import (
    Aggregator,
    Decryptor,
    Encryptor,
    KeySet,
    Manifest,
    SigningKey,
    wire,
)
from vitguard.federated.flower import (
    ClientKeys,
    EncryptedFedAvg,
    Federation,
    InProcessGrid,
    ProtectMod,
    attach,
    encryptor,
)
from vitguard.federated.flower.records import BASE, ROUND, SEALED, sealed_array

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "flower_cifar10"
PEER = 61.4  # bytes a value of NVFlare's own encryption, 8192 [60, 40, 40], measured apart


def parties(model: torch.nn.Module, clients: int, preset: str) -> SimpleNamespace:
    """Return keys, manifest and starting weights for all parameters of a model."""
    signing = SigningKey.generate()
    keys = KeySet.generate(preset=preset, max_clients=clients, server=signing.public_bytes())
    start = {n: t.detach().clone() for n, t in model.state_dict().items()}
    named = dict(model.named_parameters())
    manifest = Manifest.of({n: p.detach() for n, p in named.items()}, bounds=1.0)
    federation = Federation(keys.for_server(), signing, manifest)
    return SimpleNamespace(
        signing=signing, keys=keys, start=start, manifest=manifest, federation=federation
    )


def trained(model: torch.nn.Module, message: Message, images: int) -> Message:
    """Train on random images, in batches of 16, and return Flower's reply; both clients do this."""
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(0, images, 16):
        batch = torch.rand(16, 3, *model.patch_embed.img_size)
        optimizer.zero_grad()
        F.cross_entropy(model(batch), torch.arange(16)).backward()
        optimizer.step()
    with torch.no_grad():
        model.head.bias += 1e-3
    content = {
        "arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 1})
    }  # fmt: skip
    return Message(content=RecordDict(content), reply_to=message)


def plain_app(name: str, images: int) -> ClientApp:
    """Return a client of Flower alone."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return trained(timm.create_model(name), message, images)

    return app


def sealed_app(name: str, images: int, client: str, own: SimpleNamespace) -> ClientApp:
    """Return the same client under ProtectMod."""
    keys = ClientKeys(client, own.keys.for_client(client), own.manifest)
    app = ClientApp(mods=[ProtectMod(lambda context: keys)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = timm.create_model(name)
        attach(vg.protect(model, [vg.EncryptedGradients(encryptor=encryptor())]))
        return trained(model, message, images)

    return app


def work(call) -> float:
    """Return the processor time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def parts(own: SimpleNamespace) -> dict[str, float]:
    """Return the seconds that encrypting, adding and decrypting take, without the framework."""
    update = {e.name: torch.rand(e.shape) * 0.01 for e in own.manifest.entries}
    seal = [Encryptor(own.keys, own.manifest, client_id=c) for c in ("0", "1")]
    times, messages = {"encrypt": 0.0, "add": 0.0, "decrypt": 0.0}, []

    def encrypt(sealer: Encryptor) -> None:
        messages.append(sealer.encrypt(update, round_id=1))

    times["encrypt"] = statistics.median(work(lambda s=s: encrypt(s)) for s in seal)
    total = Aggregator(own.keys.for_server(), own.manifest, signing=own.signing, round_id=1)
    total.add(messages[0])
    times["add"] = work(lambda: total.add(messages[1]))
    summed = total.finish()
    opener = Decryptor(own.keys, own.manifest)
    times["decrypt"] = work(lambda: opener.decrypt(summed, round_id=1))
    values = own.manifest.values
    print(f"values {values}, bytes a value up {len(messages[0]) / values:.2f}, "
          f"down {len(summed) / values:.2f}, NVFlare's own {PEER}")  # fmt: skip
    return times


def throughput(name: str, images: int, rounds: int, repetitions: int) -> None:
    """Compare a round of two clients with and without encryption."""
    model = timm.create_model(name)
    own = parties(model, 2, "quantised")
    del model
    print({k: f"{v:.2f} s" for k, v in parts(own).items()}, flush=True)
    times: dict[str, list[float]] = {"plain": [], "encrypted": []}
    for _ in range(repetitions):
        for kind in times:
            if kind == "plain":
                apps = {n: plain_app(name, images) for n in (1, 2)}
                strategy: FedAvg = FedAvg(fraction_evaluate=0.0)
            else:
                apps = {n: sealed_app(name, images, str(n), own) for n in (1, 2)}
                strategy = EncryptedFedAvg(own.federation, fraction_evaluate=0.0)
            grid, start = InProcessGrid(apps), ArrayRecord(own.start)
            took = work(lambda s=strategy, g=grid, a=start: s.start(g, a, num_rounds=rounds))
            assert all(not r for r in getattr(strategy, "refused", {}).values())
            times[kind].append(took / rounds)
    plain, sealed = (statistics.median(t) for t in times.values())
    print(f"{name}, 2 clients, {images} images each, {rounds} rounds, {repetitions} repetitions:")
    print(f"plain {plain:.2f} s a round, encrypted {sealed:.2f} s, ratio {sealed / plain:.2f}")


def memory(name: str, nodes: int, plain: bool, rounds: int) -> None:
    """Print the highest resident set of a server that hears from so many nodes in a round."""
    own = parties(timm.create_model(name), max(nodes, 100), "many" if nodes <= 100 else "precise")
    update = {e.name: torch.rand(e.shape) * 0.01 for e in own.manifest.entries}
    message = Encryptor(own.keys, own.manifest, client_id="c").encrypt(update, round_id=1)
    context = wire.Context(own.keys, own.manifest, 1, "")
    ciphertexts = [bytes(c) for c in wire.open_message(message, wire.MESSAGE, context)[1]]
    metrics = {"num-examples": 1, "vitguard-clipped": 0}
    del update, message

    def sealed(message: Message, node: Context) -> Message:
        """Reply with the same ciphertexts under this client's own name and code."""
        config = message.content["config"]
        client = f"client-{node.node_id}"
        about = wire.Context(own.keys, own.manifest, config[ROUND], config[BASE])
        data = wire.write_message(
            wire.Header(wire.MESSAGE, client, 1, 1.0), ciphertexts, about,
            lambda digest: own.keys.authority.code(client, digest),
        )  # fmt: skip
        content = {"arrays": ArrayRecord({SEALED: sealed_array(data)})}
        content["metrics"] = MetricRecord(dict(metrics))
        return Message(content=RecordDict(content), reply_to=message)

    def unsealed(message: Message, node: Context) -> Message:
        content = {"arrays": ArrayRecord(own.start), "metrics": MetricRecord(dict(metrics))}
        return Message(content=RecordDict(content), reply_to=message)

    grid = InProcessGrid(dict.fromkeys(range(1, nodes + 1), unsealed if plain else sealed))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if plain:
        FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord(own.start), num_rounds=1)
        taken = nodes
    else:
        strategy = EncryptedFedAvg(own.federation, fraction_evaluate=0.0)
        strategy.start(grid, ArrayRecord(own.start), num_rounds=rounds)
        taken = nodes - len(strategy.refused[rounds])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    kind = "FedAvg" if plain else f"EncryptedFedAvg, {rounds} rounds"
    print(f"{kind}: {nodes} messages of {name} a round, {taken} in the sum: "
          f"{most} MiB at most, {before} MiB before the first round", flush=True)  # fmt: skip


VARIANTS = ("plain", "encrypted", "masks")


def accuracy(rounds: int, seeds: int, examples: int, variants: list[str]) -> None:
    """Print the last accuracy of the example's app, plain, encrypted and masked, seed by seed."""
    sys.path.insert(0, str(EXAMPLE))
    os.environ.setdefault("VITGUARD_PASSPHRASE", "of a benchmark")
    import tempfile

    import make_keys
    from flower_cifar10 import client_app, server_app, task

    make_model = task.make_model
    for module in (task, make_keys):
        module.EXAMPLES = examples
    for variant in variants:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["VITGUARD_KEYS"] = folder
                make_keys.main(folder)
                for module in (client_app, server_app):
                    module.make_model = lambda seed=seed: make_model(seed)
                grid = InProcessGrid(dict.fromkeys((1, 2, 3, 4), client_app.app))
                config = {
                    "num-server-rounds": rounds, "local-epochs": 2, "lr": 0.1, "variant": variant
                }  # fmt: skip
                for node in grid.contexts.values():
                    node.run_config.update(config)
                said: list[float] = []
                send = grid.send_and_receive

                def sending(messages, send=send, said=said, **options):
                    replies = list(send(messages, **options))
                    metrics = [r.content.metric_records.get("metrics", {}) for r in replies]
                    found = [m["accuracy"] for m in metrics if "accuracy" in m]
                    said.extend([statistics.mean(found)] if found else [])
                    return replies

                grid.send_and_receive = sending
                server_app.app(grid, Context(1, 1, {}, RecordDict(), config))
                print(f"{variant}, seed {seed}: accuracy {said[-1]:.3f} after {rounds} rounds",
                      flush=True)  # fmt: skip


def main() -> None:
    """Read the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["throughput", "memory", "accuracy"])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--plain", action="store_true", help="memory of Flower's own FedAvg")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=64, help="of each client, for accuracy")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if given.part == "throughput":
        throughput(given.model, given.images, given.rounds, given.repetitions)
    elif given.part == "accuracy":
        accuracy(given.rounds, given.seeds, given.examples, given.variants)
    elif len(given.nodes) == 1:
        memory(given.model, given.nodes[0], given.plain, given.rounds)
    else:
        for nodes in given.nodes:
            again = [sys.executable, __file__, "memory", "--nodes", str(nodes)]
            again += ["--model", given.model, "--rounds", str(given.rounds)]
            subprocess.run(again + (["--plain"] if given.plain else []), check=True)


if __name__ == "__main__":
    main()
