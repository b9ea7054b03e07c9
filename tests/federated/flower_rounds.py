"""Four Flower nodes on the grid in one process, and what can be wrong with what they send."""

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import vitguard as vg
from vitguard.data import load_images
from vitguard.defenses.encryption import KeySet, Manifest, SigningKey, worst_error
from vitguard.federated.flower import (
    ClientKeys,
    EncryptedFedAvg,
    Federation,
    InProcessGrid,
    ProtectMod,
    attach,
    encryptor,
)

NODES = (11, 12, 13, 14)
BOUND = 1.0


def tiny(small_vit):
    return small_vit(img_size=8, embed_dim=12, depth=1, num_heads=3, num_classes=2)


class Federated:
    """Four nodes, their keys, and what each does to its weights: every node adds a constant."""

    def __init__(self, small_vit, select="all", private=()):
        self.small_vit, self.select, self.private = small_vit, select, private
        self.signing = SigningKey.generate()
        self.keys = KeySet.generate(server=self.signing.public_bytes())
        rehearsal = vg.protect(tiny(small_vit), self.stack(), generator=torch.Generator())
        self.manifest = Manifest.of(rehearsal.encrypted(), bounds=BOUND, max_weight=16.0)
        self.start = {k: t.clone() for k, t in rehearsal.export().items()}
        self.names = {node: str(i) for i, node in enumerate(NODES)}
        self.node_keys = dict.fromkeys(NODES, self.keys)
        self.spoil = {}
        self.seen, self.own = {}, []
        self.outliers = dict.fromkeys(NODES, "refuse")
        self.attached = dict.fromkeys(NODES, True)
        self.grid = InProcessGrid({n: self.app(n) for n in NODES}, record=True)

    def stack(self, sealing=None):
        positions = vg.FixedPositions("sincos")
        force = self.select != "all"
        return [
            positions,
            *self.private,
            vg.EncryptedGradients(select=self.select, force=force, encryptor=sealing),
        ]

    def app(self, node, mods=None):
        def keys(context):
            own = self.node_keys[node]
            return ClientKeys(self.names[node], own.for_client(self.names[node]), self.manifest)

        app = ClientApp(mods=[ProtectMod(keys)] if mods is None else mods)

        @app.train()
        def train(message, context):
            model = tiny(self.small_vit)
            guard = vg.protect(model, self.stack(encryptor(outliers=self.outliers[node])))
            if self.attached[node]:
                attach(guard)
            given = message.content["arrays"].to_torch_state_dict()
            model.load_state_dict(given)
            self.seen.setdefault(node, []).append(given)
            state = {
                k: t + 0.001 * (node - 10) if t.is_floating_point() else t
                for k, t in model.state_dict().items()
            }
            metrics = {"num-examples": node - 10, "loss": 0.5}
            spoil = self.spoil.get(node)
            if spoil is not None:
                state, metrics = spoil(state, metrics)
            self.own.append(
                [t for k, t in state.items() if t.numel() >= 8 and "pos_embed" not in k]
            )
            content = {"arrays": ArrayRecord(state)}
            if metrics is not None:
                content["metrics"] = MetricRecord(metrics)
            return Message(content=RecordDict(content), reply_to=message)

        @app.evaluate()
        def evaluate(message, context):
            given = message.content["arrays"].to_torch_state_dict()
            mean = float(given["head.weight"].mean())
            metrics = MetricRecord({"mean": mean, "num-examples": 1})
            return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

        return app

    def strategy(self, **settings):
        federation = Federation(self.keys.for_server(), self.signing, self.manifest)
        return EncryptedFedAvg(federation, **({"fraction_evaluate": 0.0} | settings))

    def run(self, rounds=1, strategy=None, initial=None, grid=None, **settings):
        strategy = strategy or self.strategy(**settings)
        arrays = initial or ArrayRecord(self.start)
        return strategy, strategy.start(grid or self.grid, arrays, num_rounds=rounds)

    def moved(self, nodes=NODES):
        """What one round adds to each encrypted value: the average weighted by examples."""
        return sum(0.001 * (n - 10) ** 2 for n in nodes) / sum(n - 10 for n in nodes)

    def worst(self, nodes=NODES):
        """The most that a value of a round's average may be off, by the encryption preset."""
        weights = [float(n - 10) for n in nodes]
        return worst_error(BOUND, self.keys, weights, max_weight=self.manifest.max_weight)

    def off(self, weights, *rounds):
        """How far weights are from the plain weighted sums of rounds, and how far they may be."""
        moved = sum(self.moved(nodes) for nodes in rounds)
        far = (weights[n] - (self.start[n] + moved) for n in self.manifest.names)
        return max(float(f.abs().max()) for f in far), sum(map(self.worst, rounds)) + 1e-6

    def check(self, weights, *rounds):
        """Every encrypted value is within the preset's bound of the plain weighted sums."""
        off, allowed = self.off(weights, *rounds)
        assert off <= allowed, f"off by {off}, and {allowed} is what the preset allows"

    def unsealed(self):
        """What of the clients' own weights is in the bytes that went over the grid."""
        everything = b"".join(self.grid.sent)
        own = [t.float().numpy().tobytes() for state in self.own for t in state]
        own += [np.full(8, 0.001 * (n - 10), dtype="<f4").tobytes() for n in NODES]
        assert self.start["head.weight"].numpy().tobytes() in everything  # the search finds
        return [o for o in own if o[:32] in everything]


def raises(state, metrics):
    raise RuntimeError("a secret pixel 123456789")


def quotes(state, metrics):
    """As a check of the client's own data does: an error of ours with a name of a file in it."""
    load_images("a secret pixel 123456789.png", (8, 8))


def each(change):
    return lambda state, metrics: (
        {k: change(t) if t.is_floating_point() else t for k, t in state.items()},
        metrics,
    )


def weighs(number):
    return lambda state, metrics: (state, metrics | {"num-examples": number})
