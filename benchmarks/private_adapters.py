"""LoRA and a fresh head under privacy, on the ViT that others trained on CIFAR-10.

    python benchmarks/private_adapters.py --out rows.jsonl             # 8 minutes of processor time
    python benchmarks/private_adapters.py --epsilon 8 --seeds 3 --epochs 8

Each run is `train` of `examples/private_lora.py` on training images, judged on 1,000 test images;
`--rank 0` trains the head alone, by the same steps. The weights were trained on these very images
without privacy: figures compare ways to spend an epsilon, and claim nothing of these images.
VITGUARD_DATA is the data folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from evidence import SUBJECTS, TESTED, cifar
from torch.utils.data import TensorDataset

import vitguard as vg
from vitguard.data import sample_images

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from private_lora import train, with_adapters

DELTA = 1e-5


def run(epsilon: float | None, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; return accuracy, what was spent, and processor seconds."""
    torch.manual_seed(seed)
    backbone = SUBJECTS[0].model()
    normalization = SUBJECTS[0].normalization(backbone)
    pixels, labels = cifar("train")
    public = normalization.apply(sample_images((32, 32), count=4).pixels)
    model: Any = with_adapters(backbone, public, 10, max(options.rank, 1), options.strength)
    if not options.rank:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_" not in name)
    private = None
    if epsilon is not None:
        private = vg.DifferentialPrivacy(
            epsilon=epsilon, epochs=options.epochs, delta=DELTA, physical_batch=250
        )
    data = TensorDataset(normalization.apply(pixels), labels)
    began = time.process_time()
    guard = train(
        model, data, private, epochs=options.epochs, batch=-(-len(labels) // options.batches),
        rate=options.rate,
    )  # fmt: skip
    seconds = time.process_time() - began
    tests, truth = cifar("test")
    with torch.no_grad():
        said = [model.eval()(normalization.apply(t)) for t in tests[:TESTED].split(250)]
    right = (torch.cat(said).argmax(-1) == truth[:TESTED]).double().mean()
    spent = guard.privacy_spent().epsilon if private is not None else None
    return {
        "target": epsilon, "rank": options.rank, "seed": seed, "right": float(right),
        "claimed": spent, "records": len(labels), "epochs": options.epochs,
        "batches": options.batches, "rate": options.rate, "strength": options.strength,
        "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epsilon", type=float, nargs="*", default=[8.0, 2.0, 1.0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rank", type=int, default=4, help="0: the head alone")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8, help="steps in an epoch")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--strength", type=float, default=4.0)
    parser.add_argument("--plain", action="store_true", help="without privacy as well")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for target in [*([None] if options.plain else []), *options.epsilon]:
        for seed in range(options.seeds):
            row = run(target, seed, options)
            print(row, flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
