"""Is anything called `resisted` that a stronger known attack overturns?

A grid of positions, shuffle, damage, local steps, models and batch sizes. Every configuration meets
the ladder with a budget; what `resisted` meets it again with ten times the budget, and every other
attack on updates with ten times its own iterations where it has some. A configuration that
resisted and then leaks is a wrong verdict. Lines are appended to --out as they are found, and a
configuration that stands there is not run again.

    VITGUARD_DATA=... python benchmarks/red_team.py --seconds 6 --out red_team.jsonl
    python benchmarks/red_team.py --out red_team.jsonl --table
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitguard import data
from vitguard.attacks.base import Attack
from vitguard.attacks.ladder import Ladder
from vitguard.audit import LocalTraining, audit
from vitguard.core import Normalization
from vitguard.models import build_model, load_checkpoint, normalization_of
from vitguard.registry import attack_types, parse_attack

SMALL = (
    "vit_tiny_patch16_224:img_size=32,patch_size=4,embed_dim=128,depth=4,num_heads=4,"
    "mlp_ratio=2,num_classes=10"
)
CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
MODELS = {
    "cifar a": ("cifar10_vit_a.safetensors", SMALL, 32),
    "cifar b": ("cifar10_vit_b.safetensors", SMALL, 32),
    "DINOv2-small": (
        "dinov2_small_timm_fp16.safetensors",
        "vit_small_patch14_dinov2:img_size=112,num_classes=10",
        112,
    ),
    "ViT-B/32": ("", "vit_base_patch32_224:num_classes=10", 224),
}
POSITIONS = {
    "learnable": "",
    **{kind: f"positions:kind={kind}" for kind in ("frozen", "sincos", "none")},
}
DAMAGE = {
    "": "",
    **{f"noise {s:g}": f"noise:scale={s:g}" for s in (1e-3, 1e-2, 1e-1, 1.0)},
    "pruning 0.1": "pruning:keep=0.1",
}
TRAINING = {
    "": LocalTraining(),
    "2 sgd": LocalTraining(0.01, 2),
    "5 sgd": LocalTraining(0.01, 5),
    "1 adamw": LocalTraining(1e-3, 1, "adamw"),
    "2 adamw": LocalTraining(1e-3, 2, "adamw"),
}


@dataclass(frozen=True)
class Case:
    """One configuration of the grid."""

    model: str
    positions: str = "learnable"
    shuffle: bool = False
    damage: str = ""
    training: str = ""
    batch: int = 1
    also: str = ""

    @property
    def stack(self) -> str:
        """The spec of its defenses."""
        parts = [POSITIONS[self.positions], "shuffle:ratio=0.5" if self.shuffle else ""]
        return "+".join(p for p in (*parts, DAMAGE[self.damage], self.also) if p) or "none"

    @property
    def key(self) -> str:
        """What names it in the file."""
        return f"{self.model} | {self.stack} | {self.training or 'gradient'} | {self.batch}"


def grid() -> Iterator[Case]:
    """Yield every configuration."""
    for positions in POSITIONS:
        for shuffle in (False, True):
            for damage in DAMAGE:
                yield Case("cifar b", positions, shuffle, damage)
    for positions, shuffle in (("frozen", False), ("sincos", False), ("sincos", True)):
        for training in list(TRAINING)[1:]:
            yield Case("cifar a", positions, shuffle, training=training)
    for positions in ("learnable", "frozen", "sincos"):
        yield Case("cifar a", positions, batch=2)
    yield Case("cifar a", "frozen", damage="noise 0.01", batch=2)
    yield Case("cifar b", also="privacy:epsilon=8,epochs=3")
    yield Case("cifar b", "frozen", also="privacy:epsilon=8,epochs=3")
    yield Case("cifar b", also="encryption:select=plan")
    for model in ("DINOv2-small", "ViT-B/32"):
        for positions, shuffle, damage in (
            ("frozen", False, ""), ("sincos", False, ""), ("frozen", True, ""),
            ("frozen", False, "noise 0.01"),
        ):  # fmt: skip
            yield Case(model, positions, shuffle, damage)


def model_of(name: str) -> torch.nn.Module:
    """Return a model of the grid."""
    file, spec, _ = MODELS[name]
    folder = Path(os.environ["VITGUARD_DATA"]) / "weights"
    model = build_model(spec)
    if name == "cifar a":  # trained with torch's epsilon
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
    if file:
        load_checkpoint(model, folder / file)
    return model


def batch_of(case: Case) -> tuple[Tensor, Tensor]:
    """Return images that the package does not ship: CIFAR-10 test images, or photos."""
    size = MODELS[case.model][2]
    folder = Path(os.environ["VITGUARD_DATA"])
    if size == 32:
        sys.path.insert(0, str(folder))
        from load import cifar10  # type: ignore[import-not-found]

        pixels, labels = cifar10("test", 60 + case.batch)
        pixels = torch.from_numpy(pixels[60:]).permute(0, 3, 1, 2).float() / 255
        return pixels, torch.from_numpy(labels[60:])
    images = data.load_images(folder / "photos", (size, size), count=20 + case.batch)
    return images.pixels[20:], torch.arange(case.batch)


def stronger(seconds: float, factor: float) -> list[Attack]:
    """Return every attack on updates with `factor` times its budget."""
    found: list[Attack] = [Ladder(seconds=factor * seconds)]
    for name, kind in attack_types().items():
        if not issubclass(kind, Attack) or kind is Ladder or kind.rung is not None:
            continue
        attack: Any = parse_attack(name, fast=True)
        if hasattr(attack, "iterations"):
            attack = replace(attack, iterations=round(factor * attack.iterations))
        found.append(attack)
    return found


def judge(case: Case, seconds: float, factor: float) -> dict[str, Any]:
    """Return the verdict at the budget, and with ten times as much where it resisted."""
    model, batch = model_of(case.model), batch_of(case)
    how: dict[str, Any] = {
        "defenses": {case.key: case.stack} if case.stack != "none" else (),
        "training": TRAINING[case.training],
        "normalization": CIFAR if "cifar" in case.model else normalization_of(model),
    }

    def run(attacks: list[Attack]) -> list[Any]:
        found = audit(model, batch, attacks=attacks, **how).findings
        return [f for f in found if f.defended] or list(found)

    started = time.process_time()
    (first,) = run([Ladder(seconds=seconds)])
    line = {
        "key": case.key,
        "verdict": first.verdict,
        "gain": first.gain,
        "rung": first.details.get("rung"),
        "reason": first.reason,
        "seconds": round(time.process_time() - started, 1),
    }
    if first.verdict == "resisted":
        more = run(stronger(seconds, factor))
        line["stronger"] = {f.attack: (f.verdict, f.gain) for f in more}
        line["overturned"] = [f.attack for f in more if f.verdict == "leaks"]
    return line


def table(lines: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    rows = ["| configuration | verdict | gain dB | why |", "|---|---|---|---|"]
    for line in lines:
        gain = "" if line["gain"] is None else f"{line['gain']:+.1f}"
        why = line["reason"]
        if "stronger" in line:
            best = max((g for _, g in line["stronger"].values() if g is not None), default=None)
            lost = ", ".join(line["overturned"]) or "nothing leaks"
            why += f"; with ten times the budget: {lost}, best gain {best:+.1f} dB"
        rows.append(f"| {line['key'].replace(' | ', ', ')} | {line['verdict']} | {gain} | {why} |")
    count = Counter(line["verdict"] for line in lines)
    wrong = sum(bool(line.get("overturned")) for line in lines)
    told = ", ".join(f"{n} {verdict}" for verdict, n in count.most_common())
    return "\n".join([*rows, "", f"{len(lines)} configurations: {told}; overturned: {wrong}."])


def main() -> None:
    parser = argparse.ArgumentParser(description="Verdicts that a stronger attack overturns")
    parser.add_argument("--seconds", type=float, default=60.0, help="nominal, of the ladder")
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="part of a key")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    lines = []
    if options.out.exists():
        lines = [json.loads(text) for text in options.out.read_text().splitlines()]
    if options.table:
        print(table(lines))
        return
    known = {line["key"] for line in lines}
    for case in grid():
        if case.key in known or options.only not in case.key:
            continue
        line = judge(case, options.seconds, options.factor)
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line["key"], line["verdict"], line["gain"], line.get("overturned", ""), flush=True)


if __name__ == "__main__":
    main()
