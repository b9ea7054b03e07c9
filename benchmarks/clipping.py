"""Ways to clip, and averaged weights, under differential privacy: CIFAR-10 from random weights.

    VITGUARD_DATA=... python benchmarks/clipping.py --out rows.jsonl    # 14 minutes of one core

A small ViT (32/8, width 96, depth 3) on 10,000 training images without augmentation, batches of
1,000, at one epsilon and the same steps, by Adam. Each run is judged on 2,000 test images twice:
by its last weights, and by their exponential average (torch's `AveragedModel`), which spends
nothing. Every way has each rate of `--rates`; the best is chosen by the test images for all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from vitguard.core import Normalization
from vitguard.defenses.privacy.clipping import Clipping
from vitguard.models import build_model

MODEL = (
    "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=96,depth=3,num_heads=3,mlp_ratio=2,"
    "num_classes=10"
)
CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
RECORDS, BATCH, TESTED, DELTA, DECAY = 10_000, 1000, 2000, 1e-5, 0.9


@cache
def images(split: str, count: int) -> tuple[Tensor, Tensor]:
    sys.path.insert(0, os.environ["VITGUARD_DATA"])
    from load import cifar10  # type: ignore[import-not-found]

    pixels, labels = cifar10(split)[:2]
    made = torch.as_tensor(pixels[:count]).permute(0, 3, 1, 2).float() / 255
    return CIFAR.apply(made), torch.as_tensor(labels[:count]).long()


def right(model: nn.Module) -> float:
    tests, truth = images("test", TESTED)
    with torch.no_grad():
        said = torch.cat([model.eval()(t) for t in tests.split(500)]).argmax(-1)
    return float((said == truth).double().mean())


def run(clipping: Clipping, clip: float, rate: float, seed: int, options: Any) -> dict[str, Any]:
    """Train once; return accuracies of last and averaged weights, and what was spent."""
    torch.manual_seed(seed)
    model = build_model(MODEL).train()
    private = vg.DifferentialPrivacy(
        epsilon=options.epsilon, epochs=options.epochs, delta=DELTA, clip=clip,
        clipping=clipping,
    )  # fmt: skip
    guard = vg.protect(model, [private])
    optimizer, loader = guard.prepare(
        torch.optim.Adam(model.parameters(), lr=rate),
        DataLoader(TensorDataset(*images("train", RECORDS)), BATCH, shuffle=True),
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    began = time.process_time()
    for _ in range(options.epochs):
        for pixels, labels in loader:
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
    seconds = time.process_time() - began
    return {
        "clipping": clipping, "clip": clip, "rate": rate, "seed": seed, "right": right(model),
        "averaged": right(average.module), "claimed": guard.privacy_spent().epsilon,
        "epochs": options.epochs, "seconds": seconds,
    }  # fmt: skip


def said(shares: list[float]) -> str:
    return f"{statistics.mean(shares):.1%} ({', '.join(f'{x:.1%}' for x in shares)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 8e-3])
    parser.add_argument("--clips", type=float, nargs="+", default=[1.0])
    parser.add_argument("--clipping", nargs="+", default=list(get_args(Clipping)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for clipping in options.clipping:
        for clip in options.clips:
            for rate in options.rates:
                rows = [run(clipping, clip, rate, seed, options) for seed in range(options.seeds)]
                last, mean = (said([r[k] for r in rows]) for k in ("right", "averaged"))
                print(
                    f"{clipping:10} clip {clip:<5g} rate {rate:<6g} last {last}, averaged {mean}, "
                    f"{rows[0]['seconds']:.0f} s",
                    flush=True,
                )
                if options.out:
                    with options.out.open("a") as file:
                        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
