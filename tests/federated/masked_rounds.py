"""Six Flower nodes under masks on the grid in one process, and what can be wrong with a message."""

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import vitguard as vg
from vitguard.defenses.encryption import Manifest, SigningKey
from vitguard.defenses.masking import Terms
from vitguard.federated.flower import (
    InProcessGrid,
    MaskedFedAvg,
    MaskedFederation,
    MaskingIdentity,
    ProtectMod,
    attach,
    masker,
)
from vitguard.federated.flower.masked_client import PHASE

NODES = (11, 12, 13, 14, 15, 16)
THRESHOLD = 4
PHASES = ("keys", "shares", "values", "agreement", "answers")
BOUND = 1.0


def tiny(small_vit):
    return small_vit(img_size=8, embed_dim=12, depth=1, num_heads=3, num_classes=2)


def phase_of(message):
    found = message.content.config_records.get("vitguard", {})
    return found.get(PHASE)


class Masked:
    """Each node adds a constant of its own to its weights; `moved` is what a round then adds."""

    def __init__(self, small_vit, select="all", outliers="refuse", private=()):
        self.small_vit, self.select = small_vit, select
        self.outliers, self.private = outliers, private
        self.signing = SigningKey.generate()
        self.names = {node: str(i) for i, node in enumerate(NODES)}
        self.identities = {name: SigningKey.generate() for name in self.names.values()}
        rehearsal = vg.protect(tiny(small_vit), self.stack(), generator=torch.Generator())
        manifest = Manifest.of(rehearsal.encrypted(), bounds=BOUND, max_weight=16.0)
        public = {name: key.public_bytes() for name, key in self.identities.items()}
        self.terms = Terms(manifest, public, self.signing.public_bytes(), THRESHOLD)
        self.start = {k: t.clone() for k, t in rehearsal.export().items()}
        self.spoil, self.seen, self.own, self.folder = {}, {}, [], None
        self.attached = dict.fromkeys(NODES, True)
        self.stacks, self.own_terms = dict.fromkeys(NODES, self.stack), {}  # of each node
        self.grid = InProcessGrid({n: self.app(n) for n in NODES}, record=True)
        self.silent = {}  # phase -> nodes whose answer never comes
        self.change = lambda phase, message: message  # what becomes of the server's messages
        self._send, self.grid.send_and_receive = self.grid.send_and_receive, self._sending

    def _sending(self, messages, **options):
        messages = list(messages)
        phase = phase_of(messages[0]) if messages else None
        self.grid.late = set(self.silent.get(phase, ()))
        return self._send([self.change(phase, m) for m in messages], **options)

    def stack(self, client=None):
        force = self.select != "all"
        masks = vg.MaskedAggregation(select=self.select, force=force, client=client)
        return [vg.FixedPositions("sincos"), *self.private, masks]

    def identity(self, node):
        name = self.names[node]
        journal = None if self.folder is None else self.folder / f"{name}.journal"
        terms = self.own_terms.get(node, self.terms)
        return MaskingIdentity(name, self.identities[name], terms, journal)

    def app(self, node, mods=None):
        mod = ProtectMod(identity=lambda context: self.identity(node))
        app = ClientApp(mods=[mod] if mods is None else mods)

        @app.train()
        def train(message, context):
            model = tiny(self.small_vit)
            guard = vg.protect(model, self.stacks[node](masker(outliers=self.outliers)))
            if self.attached[node]:
                attach(guard)
            given = message.content["arrays"].to_torch_state_dict()
            model.load_state_dict(given)
            self.seen.setdefault(node, []).append(given)
            state = {
                k: t + self.constant(node) if t.is_floating_point() else t
                for k, t in model.state_dict().items()
            }
            metrics = {"num-examples": node - 10, "loss": 0.5}
            if node in self.spoil:
                state, metrics = self.spoil[node](state, metrics)
            self.own += [t for k, t in state.items() if t.numel() >= 8 and "pos_embed" not in k]
            content = {"arrays": ArrayRecord(state)}
            if metrics is not None:
                content["metrics"] = MetricRecord(metrics)
            return Message(content=RecordDict(content), reply_to=message)

        @app.evaluate()
        def evaluate(message, context):
            given = message.content["arrays"].to_torch_state_dict()
            metrics = MetricRecord({"mean": float(given["head.weight"].mean()), "num-examples": 1})
            return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

        return app

    def constant(self, node):
        return 0.001 * (node - 10)

    def strategy(self, **settings):
        federation = MaskedFederation(self.signing, self.terms)
        return MaskedFedAvg(federation, **({"fraction_evaluate": 0.0} | settings))

    def run(self, rounds=1, strategy=None, initial=None, **settings):
        strategy = strategy or self.strategy(**settings)
        result = strategy.start(self.grid, initial or ArrayRecord(self.start), num_rounds=rounds)
        return strategy, result

    def moved(self, nodes=NODES):
        """What one round adds to each masked value: the average weighted by examples."""
        return sum(self.constant(n) * (n - 10) for n in nodes) / sum(n - 10 for n in nodes)

    def error(self, result, nodes=NODES, rounds=1):
        """The largest error of any masked weight after so many rounds of these nodes."""
        after, due = result.arrays.to_torch_state_dict(), rounds * self.moved(nodes)
        names = self.terms.manifest.names
        return max(float((after[n] - self.start[n] - due).abs().max()) for n in names)

    def unchanged(self, result):
        if result.arrays is None or not len(result.arrays):
            return True
        after = result.arrays.to_torch_state_dict()
        return all(torch.equal(after[n], t) for n, t in self.start.items())

    def unmasked(self):
        """What of the clients' own values is in the bytes that went over the grid."""
        everything = b"".join(self.grid.sent)
        own = [t.float().numpy().tobytes() for t in self.own]
        own += [np.full(8, self.constant(n), dtype="<f4").tobytes() for n in NODES]
        assert self.start["head.weight"].numpy().tobytes() in everything  # the search finds
        integers = [n for n in NODES if any(self.holds_quantised(d, n) for d in self.grid.sent)]
        return [o for o in own if o[:32] in everything] + integers

    def holds_quantised(self, data, node, run=8):
        """Whether bytes hold eight neighbours of a node's update as its unmasked integers."""
        unit = self.terms.levels / BOUND * (node - 10) / self.terms.manifest.max_weight
        due = self.constant(node) * unit
        for offset in range(4):
            words = np.frombuffer(data[offset : len(data) - (len(data) - offset) % 4], "<i4")
            near = np.abs(words.astype(np.float64) - due) < 1e-6 * abs(due) + 2
            if run in np.convolve(near, np.ones(run, int), "valid"):
                return True
        return False
