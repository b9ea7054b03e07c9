"""A head on DINOv2-small under differential privacy: CIFAR-10 at 112 px, features cached once.

    VITGUARD_DATA=... python benchmarks/private_probe.py CACHE --features
    VITGUARD_DATA=... python benchmarks/private_probe.py CACHE [--seeds 3] [--out ROWS]

The backbone stays as it was given, so its features are computed once: about 40 minutes of one
core, in pieces that are not made again. They are centred by the mean feature of the public photos
of the data folder, which spends no privacy: the common part of all vectors would take up most of
the clip and of the step. The head is then trained with DP-SGD, and without privacy by the same
steps with neither clipping nor noise. A run trains beside
`--canaries` records of which each takes part by a coin: the adversary knows every other record and
all weights, scores each by what the noisy gradients have along its own, and what these scores prove
stands beside what is claimed: of whole runs, and of each step's noise and sampling, composed.
The risk corridor stands in one unit: how many members a test with 1 % false alarms finds, as the
ledger bounds it, as the adversary did on this run, and as the canaries prove it. Rates and epochs
were chosen on 5,000 training images that no run trains on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vitguard.core import Normalization
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.defenses.privacy.canaries import prove_noise
from vitguard.defenses.privacy.trade_off import power_of
from vitguard.defenses.privacy.verification import canary_bound
from vitguard.draws import Draws
from vitguard.models import build_model, load_checkpoint

PIECE, SIZE, WIDTH, CLASSES = 2500, 112, 384, 10
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LENGTH = 10.0  # of the public feature vectors on average
DELTA, BATCH, RATE = 1e-5, 5000, 4.0
EPOCHS = {1.0: 10, 2.0: 10}  # elsewhere:
LONG = 30
HELD = 5000  # training images on which rates and epochs were chosen
ALARMS = 0.01  # share of records that were not there and are called members


@dataclass(frozen=True)
class Row:
    """One training run.

    Args:
        accuracy: Share of test images that are right.
        claimed, proved: Epsilon by the ledger, and what the canaries prove of it at 95 %, each
            scored once for the whole run.
        composed: What they prove at 95 % of the noise and the sampling of the steps, composed.
        bound, reached, shown: Share of members that a test with 1 % false alarms finds: at most, by
            the ledger; the canaries that this adversary found in this run; at least for the best
            adversary, by `composed`.
        seconds: Processor time of the training, canaries included.
    """

    target: float | None
    seed: int
    accuracy: float
    noise: float
    steps: int
    claimed: float | None
    proved: float | None
    composed: float | None
    bound: float | None
    reached: float | None
    shown: float | None
    seconds: float


def make_features(cache: Path) -> None:
    """Write the class tokens of all images, piece by piece."""
    folder = Path(os.environ["VITGUARD_DATA"])
    sys.path.insert(0, str(folder))
    from load import cifar10  # type: ignore[import-not-found]

    model = build_model(f"vit_small_patch14_dinov2:img_size={SIZE},num_classes=0").eval()
    load_checkpoint(model, folder / "weights" / "dinov2_small_timm_fp16.safetensors")
    cache.mkdir(exist_ok=True)
    small = photos(folder)
    for split in ("public", "test", "train"):
        pixels, labels = (small, np.zeros(len(small))) if split == "public" else cifar10(split)
        for begin in range(0, len(labels), PIECE):
            file = cache / f"{split}-{begin:06d}.pt"
            if file.exists():
                continue
            part = torch.from_numpy(pixels[begin : begin + PIECE]).permute(0, 3, 1, 2)
            made = []
            with torch.inference_mode():
                for images in part.split(50):
                    large = F.interpolate(images.float() / 255, (SIZE, SIZE), mode="bicubic")
                    made.append(model(IMAGENET.apply(large.clamp(0, 1))))
            found = torch.cat(made), torch.from_numpy(labels[begin : begin + PIECE]).long()
            torch.save(found, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
            print(file.name, flush=True)


def photos(folder: Path) -> np.ndarray:
    """Return public photos as small as CIFAR's images, and mirrored, (count, 32, 32, 3) bytes."""
    files = sorted(f for f in (folder / "photos").iterdir() if f.suffix != ".csv")
    small = np.stack([np.array(ImageOps.fit(Image.open(f).convert("RGB"), (32, 32)))
                      for f in files])  # fmt: skip
    return np.concatenate((small, small[:, :, ::-1]))


def features(cache: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return feature vectors, (count, width), as the public ones are centred and scaled; labels."""
    public, _ = _read(cache, "public")
    centre = public.mean(0)
    vectors, labels = _read(cache, split)
    return (vectors - centre) * (LENGTH / (public - centre).norm(dim=1).mean()), labels


def _read(cache: Path, split: str) -> tuple[Tensor, Tensor]:
    parts = [torch.load(f, weights_only=True) for f in sorted(cache.glob(f"{split}-*.pt"))]
    vectors, labels = (torch.cat(p) for p in zip(*parts, strict=True))
    return vectors, labels


def canaries_of(count: int) -> tuple[Tensor, Tensor]:
    """Return records whose gradients are orthogonal to each other and as long as the clip."""
    basis, _ = torch.linalg.qr(torch.randn(WIDTH, count))
    return basis.T * LENGTH, torch.arange(count) % CLASSES


def gradients(head: nn.Linear, x: Tensor, y: Tensor, clip: float) -> Tensor:
    """Return the clipped gradient of each example, (count, classes * width)."""
    wrong = head(x).softmax(-1) - F.one_hot(y, CLASSES)
    whole = (wrong[:, :, None] * x[:, None]).flatten(1)
    return whole * (clip / whole.norm(dim=1, keepdim=True)).clamp(max=1)


def run(
    cache: Path, epsilon: float | None, seed: int, count: int, rate: float, *, held_out: bool
) -> Row:
    """Train one head and judge it on the test images, or on training images held out."""
    torch.manual_seed(seed)
    x, y = features(cache, "train")
    test = (x[-HELD:], y[-HELD:]) if held_out else features(cache, "test")
    x, y = x[:-HELD], y[:-HELD]
    planted, named = canaries_of(count)
    taken = torch.rand(count) < 0.5
    own = torch.cat((torch.full((len(y),), -1), torch.arange(count)[taken]))
    data = TensorDataset(torch.cat((x, planted[taken])), torch.cat((y, named[taken])), own)
    head = nn.Linear(WIDTH, CLASSES, bias=False)
    nn.init.zeros_(head.weight)
    epochs = EPOCHS.get(epsilon or math.inf, LONG)
    shorter = 1 if epsilon is not None else LENGTH  # gradients that nothing clips are as long
    optimizer: Any = torch.optim.SGD(head.parameters(), lr=rate / shorter, momentum=0.9)
    loader: Any = DataLoader(data, BATCH, shuffle=True)
    began = time.process_time()
    if epsilon is not None:
        defense = DifferentialPrivacy(epsilon=epsilon, epochs=float(epochs), delta=DELTA)
        optimizer, loader, ledger = defense.prepare(head, optimizer, loader, Draws())
    scores, steps, average = torch.zeros(count), 0, torch.zeros_like(head.weight)
    planned = epochs * len(loader)
    seen, there = [], []  # of canaries that take part and are as long as the clip, step by step
    for _ in range(epochs):
        for vectors, labels, who in loader:
            optimizer.zero_grad()
            before = nn.Linear(WIDTH, CLASSES, bias=False)
            before.load_state_dict(head.state_dict())
            F.cross_entropy(head(vectors), labels).backward()
            optimizer.step()
            steps += 1
            if steps > planned // 2:
                average += head.weight.detach()
            if count and epsilon is not None:
                with torch.no_grad():
                    released = head.weight.grad.flatten() * loader.expected_batch_size
                    others = who < 0
                    known = gradients(before, vectors[others], labels[others], defense.clip)
                    their = gradients(before, planted, named, defense.clip)
                    along = F.normalize(their) @ (released - known.sum(0))
                    scores += along
                    whole = taken & (their.norm(dim=1) > 0.999 * defense.clip)
                    seen.append(along[whole] / defense.clip)
                    there.append(torch.isin(torch.arange(count), who)[whole])
    seconds = time.process_time() - began
    with torch.no_grad():
        head.weight.copy_(average / (steps - planned // 2))
        right = (head(test[0]).argmax(-1) == test[1]).double().mean()
    spent = None if epsilon is None else defense.privacy_spent(ledger).epsilon
    proved = composed = bound = reached = shown = None
    if count and epsilon is not None:
        proved = canary_bound(scores[~taken], scores[taken], DELTA).epsilon
        proof = prove_noise(torch.cat(seen), torch.cat(there), sampled=True)
        composed = proof.epsilon(DELTA, steps)
        bound, shown = power_of(ledger.history)(ALARMS), proof.power(ALARMS, steps)
        reached = found(scores[~taken], scores[taken])
    multiplier = ledger.history[0][0] if epsilon is not None else 0.0
    return Row(
        epsilon, seed, float(right), multiplier, steps, spent, proved, composed, bound, reached,
        shown, seconds,
    )  # fmt: skip


def found(absent: Tensor, present: Tensor) -> float:
    """Return the share of `present` above all but `ALARMS` of `absent`."""
    threshold = absent.sort(descending=True).values[int(ALARMS * len(absent))]
    return float((present > threshold).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--features", action="store_true", help="compute them, and nothing else")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 2.0, 8.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--canaries", type=int, default=300)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--held-out", action="store_true", help="judge on training images")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.features:
        return make_features(options.cache)
    targets: list[Any] = [None, *options.epsilon]
    for target in targets:
        for seed in range(options.seeds):
            row = run(
                options.cache, target, seed, options.canaries, options.rate,
                held_out=options.held_out,
            )  # fmt: skip
            print(row, flush=True)
            pairs = (row.proved, row.claimed), (row.composed, row.claimed), (row.shown, row.bound)
            for proved, claimed in pairs:
                if proved is not None and claimed is not None and proved > claimed:
                    raise SystemExit(f"proved {proved:.3f} of claimed {claimed:.3f}")
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
