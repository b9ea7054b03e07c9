"""A Flower round under masks beside the same round without: processor time, ViT-Ti, one process.

    python benchmarks/flower_masks.py [--clients 4] [--images 32] [--repetitions 3]

Both run on the in-process grid, with Flower's own protocol buffers. Each client trains on a few
images; rounds of both kinds take turns, and medians are compared. A round without training, which
only moves weights, is measured as well: that is where masks cost most.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

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


def make_model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224")


def app_of(images: int, mods: list) -> ClientApp:
    """Flower's template; the train function differs by two lines with masks."""
    app = ClientApp(mods=mods)
    data, labels = torch.randn(images, 3, 224, 224), torch.randint(1000, (images,))

    @app.train()
    def train(message, context):
        model = make_model()
        if mods:
            attach(vg.protect(model, [vg.MaskedAggregation(client=masker())]))
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for start in range(0, images, 8):
            optimizer.zero_grad()
            part = slice(start, start + 8)
            F.cross_entropy(model(data[part]), labels[part]).backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": max(1, images)})
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
        return Message(content=RecordDict(content), reply_to=message)

    return app


class Rounds:
    """Rounds with or without masks, of the same clients."""

    def __init__(self, clients: int, images: int, masked: bool) -> None:
        names = [str(n) for n in range(clients)]
        start = make_model().state_dict()
        self.arrays, self.number = ArrayRecord(start), 0
        identities = {n: SigningKey.generate() for n in names}
        signing = SigningKey.generate()
        manifest = Manifest.of(start, bounds=0.5, max_weight=max(1, images))
        public = {n: key.public_bytes() for n, key in identities.items()}
        terms = Terms(manifest, public, signing.public_bytes())
        self.federation = MaskedFederation(signing, terms)

        def app(name: str) -> ClientApp:
            identity = MaskingIdentity(name, identities[name], terms)
            return app_of(images, [ProtectMod(identity=lambda c: identity)] if masked else [])

        self.grid = InProcessGrid({n + 1: app(name) for n, name in enumerate(names)})
        self.masked = masked

    def play(self) -> float:
        """Run one round and return its processor time."""
        self.number += 1
        if self.masked:
            strategy = MaskedFedAvg(self.federation, first_round=self.number, fraction_evaluate=0.0)
        else:
            strategy = FedAvg(fraction_evaluate=0.0)
        begun = time.process_time()
        result = strategy.start(self.grid, self.arrays, num_rounds=1)
        spent = time.process_time() - begun
        assert len(result.arrays) == len(self.arrays)
        return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="show where a masked round goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.profile:
        rounds, profile = Rounds(options.clients, 0, True), cProfile.Profile()
        rounds.play()
        profile.runcall(rounds.play)
        pstats.Stats(profile).sort_stats("cumtime").print_stats("vitguard", 30)
        return
    for images in sorted({0, options.images}):
        plain, masked = (Rounds(options.clients, images, m) for m in (False, True))
        pairs = [(plain.play(), masked.play()) for _ in range(options.repetitions + 1)][1:]
        bare, hidden = (statistics.median(column) for column in zip(*pairs, strict=True))
        each = (hidden - bare) / options.clients
        print(
            f"{options.clients} clients, {images} images each: plain {bare:.2f} s, masked "
            f"{hidden:.2f} s, ratio {hidden / bare:.3f}; masks {each:.3f} s a client"
        )


if __name__ == "__main__":
    main()
