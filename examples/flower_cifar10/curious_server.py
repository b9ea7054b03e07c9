"""An honest-but-curious Flower server: it follows the protocol, and attacks what clients send.

Three clients with one photo each train one step from the public model, once without vitguard and
once with it, on Flower's own messages in one process. The server writes each incoming update into a
folder, then attacks all of them: python curious_server.py FOLDER.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from flower_cifar10.task import make_model, protected
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import vitguard as vg
from vitguard import data
from vitguard.defenses.encryption import KeySet, Manifest, SigningKey
from vitguard.federated.curious import Recording, update_of
from vitguard.federated.flower import (
    ClientKeys,
    EncryptedFedAvg,
    Federation,
    InProcessGrid,
    ProtectMod,
    attach,
    encryptor,
)
from vitguard.federated.flower.records import SEALED

NODES = {1: "node 1", 2: "node 2", 3: "node 3"}
RATE = 0.05
CONFIG = {"variant": "encrypted", "num-server-rounds": 1, "local-epochs": 1}
DEFENSES = "positions:kind=sincos+shuffle:ratio=0.5+encryption"


class Curious:
    """What makes a strategy curious: it keeps the updates before it adds them."""

    recording: Recording

    def configure_train(self, server_round, arrays, config, grid):
        """Remember what is sent."""
        self.sent = arrays.to_torch_state_dict()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        """Keep what comes back."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                sys.exit(f"node {reply.metadata.src_node_id}: {reply.error.reason}")
            (arrays,) = reply.content.array_records.values()
            arrived = {
                n: a.data if n == SEALED else torch.from_numpy(a.numpy().copy())
                for n, a in arrays.items()
            }
            update = update_of(
                arrived, self.sent, whole=SEALED not in arrived, learning_rate=RATE,
                batch_size=int(reply.content["metrics"]["num-examples"]),
            )  # fmt: skip
            node = NODES[reply.metadata.src_node_id]
            self.recording.keep(server_round, node, update, self.sent)
        return super().aggregate_train(server_round, replies)


class CuriousFedAvg(Curious, FedAvg):
    """Flower's averaging, curious."""


class CuriousEncryptedFedAvg(Curious, EncryptedFedAvg):
    """vitguard's averaging, curious."""


def photos():
    """Return one sample photo for each node, pixels in [0, 1], and its label."""
    pixels = data.sample_images((32, 32), count=len(NODES)).pixels
    labels = data.assign_labels(len(NODES), 10)
    return {n: (pixels[i : i + 1], labels[i : i + 1]) for i, n in enumerate(NODES.values())}


def client(node, keys=None):
    """Return a client app: Flower's template, with vitguard where there are keys."""
    app = ClientApp(mods=[ProtectMod(lambda context: keys)] if keys else [])
    pixels, labels = photos()[NODES[node]]

    @app.train()
    def train_model(message: Message, context) -> Message:
        model = make_model().train()
        guard = attach(protected(model, CONFIG, encryptor)) if keys else None
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        if guard is not None:
            optimizer = guard.prepare(optimizer)
        loss = F.cross_entropy(model(vg.Normalization().apply(pixels)), labels)
        loss.backward()
        optimizer.step()
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"loss": loss.item(), "num-examples": len(labels)}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    return app


def undefended(recording):
    """Run a round without vitguard."""
    strategy = CuriousFedAvg(fraction_evaluate=0.0)
    strategy.recording = recording
    grid = InProcessGrid({node: client(node) for node in NODES})
    strategy.start(grid, ArrayRecord(make_model().state_dict()), num_rounds=1)


def defended(recording):
    """Run a round in which positions are fixed, patches shuffled, and updates encrypted."""
    model = make_model()
    guard = vg.protect(model, DEFENSES, generator=torch.Generator())
    signing = SigningKey.generate()
    keys = KeySet.generate(server=signing.public_bytes())
    manifest = Manifest.of(guard.encrypted(), bounds=1.0)
    strategy = CuriousEncryptedFedAvg(
        Federation(keys.for_server(), signing, manifest), fraction_evaluate=0.0
    )
    strategy.recording = recording
    own = {node: ClientKeys(str(node), keys.for_client(str(node)), manifest) for node in NODES}
    grid = InProcessGrid({node: client(node, own[node]) for node in NODES})
    strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=1)
    if strategy.refused[1]:
        sys.exit(f"refused: {strategy.refused[1]}")


def main(folder: str) -> vg.AuditReport:
    """Run both rounds, attack what was kept, write the report."""
    plain, sealed = Recording(Path(folder) / "plain"), Recording(Path(folder) / "sealed")
    undefended(plain)
    defended(sealed)
    kept = plain.rounds(make_model(), images=photos(), title="without vitguard")
    kept += sealed.rounds(make_model(), DEFENSES, images=photos(), title="with vitguard")
    report = vg.audit(kept, attacks=["position", "span"], model_name="the example's model")
    report.save(Path(folder) / "curious-server.html")
    return report


if __name__ == "__main__":
    from rich.console import Console

    main(sys.argv[1]).print_to(Console())
