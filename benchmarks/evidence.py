"""What stood: stacks of defenses, each under the ladder, on each model, and what they cost.

    python benchmarks/evidence.py rows.jsonl               # measures what is not in the file yet
    python benchmarks/evidence.py rows.jsonl --only cifar  # cells of models, costs of settings
    python benchmarks/evidence.py rows.jsonl --stack stem  # cells and costs of these stacks
    python benchmarks/evidence.py rows.jsonl --batch 1     # cells of one batch size
    python benchmarks/evidence.py rows.jsonl --costs       # trains under each stack
    python benchmarks/evidence.py rows.jsonl --make        # writes what vitguard carries, and docs

Rows are written one by one: a run that is ended goes on where it was. A cell that is not in the
file is `not run`, with the reason; `feature_decoder.py --evidence` adds cells of its own. The data
folder is VITGUARD_DATA; photos are scikit-image's.

Each setting has its own stacks. A stack is attacked with the smallest batch that it lets leave, in
two cases: `natural`, the first images of the data; and `dominant`, where one image has a wrong
label among those the model is surest of, and so outweighs its batch (trained models only). Of one
image an update there are two updates: an image that is picked out of decoys decides nothing alone.

Costs are of training by the updates that leave: a server's Adam (rate 1e-3) on one client's
gradient a step, on the trained CIFAR ViT with a fresh head (`finetune`), or from random weights
(`scratch`); accuracy on 1,000 test images.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitguard import data
from vitguard.audit import audit
from vitguard.core import Normalization
from vitguard.defenses.base import traits_of
from vitguard.errors import VitguardError
from vitguard.evidence import WITHIN, Cell, Cost, Evidence, read_evidence
from vitguard.guard import protect
from vitguard.models import build_model, load_checkpoint, normalization_of
from vitguard.registry import parse_stack
from vitguard.vit import Anatomy

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "vitguard" / "evidence.json"
PAGE = ROOT / "docs" / "advise.md"
FIGURE = ROOT / "docs" / "images" / "evidence.png"
ATTACKS = ("ladder:seconds=30", "position", "map:seconds=30")
"""The ladder hands back one guess, so what it passes over is also run alone."""
FLOOR = "positions:kind=frozen+batch-floor+sample-normalisation"
STEM = "frozen-stem+batch-floor+sample-normalisation"
STACKS = {
    "scratch": (
        "none",
        "positions:kind=frozen",
        "sign-update",
        "quantised-update:bits=4",
        "low-rank:rank=2",
        "batch-floor:multiple=1.0",
        "batch-floor",
        FLOOR,
        f"{FLOOR}+low-rank:rank=2",
        f"{FLOOR}+sign-update",
        "privacy:noise=1.0",
    ),
    "finetune": (
        "none",
        "positions:kind=frozen",
        "frozen-stem:trained=0",
        "frozen-stem",
        "frozen-stem:trained=2",
        "frozen-stem+low-rank:rank=2",
        "frozen-stem+sign-update",
        "sign-update",
        "quantised-update:bits=4",
        "low-rank:rank=2",
        STEM,
        f"{STEM}+low-rank:rank=2",
        f"{STEM}+sign-update",
        "privacy:noise=1.0",
    ),
}
CIFAR = (
    "vit_tiny_patch16_224:img_size=32,patch_size=4,embed_dim=128,depth=4,num_heads=4,mlp_ratio=2,"
    "num_classes=10"
)
SMALL = "vit_small_patch14_dinov2:img_size=112,num_classes=10"
STEPS, BATCH, SEEDS, TESTED = 60, 32, 3, 1000
KNOWN = "weights that were trained on this very task"
NOTHING = -15.0  # dB at which a stack is drawn that gives no image at all


@dataclass(frozen=True)
class Subject:
    """A model that stacks are attacked on."""

    name: str
    setting: str
    spec: str
    weights: str = ""

    def model(self) -> nn.Module:
        model = build_model(self.spec)
        if not self.weights:
            return model
        if "cifar" in self.weights:
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 1e-5
        load_checkpoint(model, folder() / "weights" / self.weights)
        return model

    def normalization(self, model: nn.Module) -> Normalization:
        if "cifar" in self.name:
            return Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        return normalization_of(model)

    def images(self, count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if "cifar" in self.name:
            pixels, labels = cifar("test")
            return pixels[:count], labels[:count]
        files = sorted((folder() / "photos").iterdir())[:count]
        loaded = data.load_images([str(f) for f in files], size)
        return loaded.pixels, torch.arange(count) % 10


SUBJECTS = (
    Subject("trained cifar vit, 128 wide", "finetune", CIFAR, "cifar10_vit_a.safetensors"),
    Subject("random cifar vit, 128 wide", "scratch", CIFAR),
    Subject(
        "dinov2-small at 112 px, 384 wide", "finetune", SMALL, "dinov2_small_timm_fp16.safetensors"
    ),
    Subject("random vit-s/16, 384 wide", "scratch", "vit_small_patch16_224:num_classes=10"),
    Subject("random vit-b/32, 768 wide", "scratch", "vit_base_patch32_224:num_classes=10"),
    Subject("random vit-b/16, 768 wide", "scratch", "vit_base_patch16_224:num_classes=10"),
)


def folder() -> Path:
    return Path(os.environ["VITGUARD_DATA"])


@cache
def cifar(split: str) -> tuple[Tensor, Tensor]:
    sys.path.insert(0, str(folder()))
    from load import cifar10  # type: ignore[import-not-found]

    images, labels = cifar10(split)[:2]
    pixels = torch.as_tensor(images[:4000]).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.as_tensor(labels[:4000]).long()


def cells() -> Iterator[tuple[Subject, list[Cell]]]:
    """Every cell of the table, small models first; those of one batch together."""
    for subject in SUBJECTS:
        with torch.device("meta"):  # sizes are enough
            anatomy = Anatomy.of(build_model(subject.spec))
        groups: dict[int, list[str]] = {size: ["none"] for size in (1, *floors(anatomy))}
        for stack in STACKS[subject.setting]:
            if stack != "none":
                least = max([1, *(d.least_batch(anatomy) for d in parse_stack(stack))])
                groups[least].append(stack)
        for size, stacks in reversed(groups.items()):
            both = bool(subject.weights) and size > 1
            for case in ("natural", "dominant") if both else ("natural",):
                one = Cell("", subject.name, subject.setting, size, case, "")
                yield subject, [replace(one, stack=s, attack=a) for s in stacks for a in ATTACKS]


def floors(anatomy: Anatomy) -> Iterator[int]:
    for multiple in (1.0, 4.0):
        yield parse_stack(f"batch-floor:multiple={multiple}")[0].least_batch(anatomy)


def measured(subject: Subject, asked: list[Cell]) -> list[Cell]:
    """Attack one batch under each stack, and its control, with every attack."""
    cell, model = asked[0], subject.model()
    normalization = subject.normalization(model)
    size = Anatomy.of(model).image_size
    pixels, labels = subject.images(max(cell.batch, 2), size)
    if cell.case == "dominant":  # one wrong label among those that the model is surest of
        pixels, _ = subject.images(max(40, cell.batch), size)
        with torch.no_grad():
            sure, named = model.eval()(normalization.apply(pixels)).softmax(-1).max(-1)
        best = sure.argsort(descending=True)[: cell.batch]
        pixels, labels = pixels[best], named[best].clone()
        labels[0] = (labels[0] + 1) % 10
    stacks = {c.stack: parse_stack(c.stack) for c in asked if c.stack != "none"}
    report = audit(
        model, (pixels, labels), defenses=stacks, attacks=list(ATTACKS), batch_size=cell.batch,
        normalization=normalization,
    )  # fmt: skip
    return [_found(c, report, f) for c, f in zip(asked, report.findings, strict=True)]


def _found(cell: Cell, report: Any, finding: Any) -> Cell:
    psnr = finding.patch_psnr.max if finding.patch_psnr else None
    assert (cell.stack, cell.attack.partition(":")[0]) == (finding.defense, finding.attack), finding
    floor, details = report.baseline.thumbnail, finding.details
    cut = [n for n, o in details.get("outcomes", {}).items() if o == "cut"]
    proved = details.get("verified", 0.0)
    return replace(
        cell, psnr=psnr, above=None if psnr is None or floor is None else psnr - floor,
        verdict=finding.verdict, proved=proved if isinstance(proved, float) else 0.0,
        cut=", ".join(cut or details.get("unfinished", ())), note=finding.reason[:160],
    )  # fmt: skip


def sent_bytes(tensors: dict[str, Tensor], stack: str) -> float:
    """Bytes of an update as its last defense can write it: factors, signs, or few bits."""
    total = 0.0
    rank = traits_of(parse_stack(stack), Anatomy.of(build_model(CIFAR))).rank
    for tensor in tensors.values():
        if tensor.dim() < 2:
            matrix = tensor.reshape(1, -1)
        elif len(tensor) > 1:
            matrix = tensor.flatten(1)
        else:
            matrix = tensor.reshape(-1, tensor.shape[-1])
        bits = 32.0
        if "sign-update" in stack:
            bits = 1.0
        elif "quantised-update:bits=4" in stack:
            bits = 4.0
        values = tensor.numel()
        if rank and min(matrix.shape) > rank:
            values = rank * sum(matrix.shape)
        total += bits * values / 8
    return total


def trained(stack: str, setting: str, seed: int) -> tuple[float, float, float]:
    """Train by the updates that leave; return accuracy, processor seconds of a step, and bytes."""
    torch.manual_seed(seed)
    subject = SUBJECTS[0] if setting == "finetune" else SUBJECTS[1]
    model = subject.model()
    if setting == "finetune":
        nn.init.trunc_normal_(model.head.weight, std=0.02)
        nn.init.zeros_(model.head.bias)
    normalization = subject.normalization(model)
    guard = protect(model.train(), parse_stack(stack))
    held = dict(guard.model.named_parameters())
    optimizer = torch.optim.Adam([p for p in held.values() if p.requires_grad], lr=1e-3)
    pixels, labels = cifar("train")
    spent, sent = 0.0, 0.0
    for _ in range(STEPS):
        chosen = torch.randint(len(labels), (BATCH,))
        began = time.process_time()
        update = guard.update(normalization.apply(pixels[chosen]), labels[chosen])
        spent += time.process_time() - began
        sent = sent or sent_bytes(dict(update.tensors), stack)
        for name, parameter in held.items():
            parameter.grad = update.tensors.get(name)
        with guard.rehearsing():
            optimizer.step()
    guard.model.eval()
    tests, truth = cifar("test")
    with torch.no_grad():
        said = torch.cat([guard.model(normalization.apply(t)) for t in tests[:TESTED].split(250)])
    right = (said.argmax(-1) == truth[:TESTED]).double().mean()
    return float(right), spent / STEPS, sent


def cost(stack: str, setting: str, plain: list[tuple[float, float, float]]) -> tuple[Cost, Any]:
    runs = [trained(stack, setting, seed) for seed in range(SEEDS)]
    ours, theirs = ([sum(x) / len(x) for x in zip(*r, strict=True)] for r in (runs, plain or runs))
    subject = SUBJECTS[0] if setting == "finetune" else SUBJECTS[1]
    return Cost(
        stack, subject.name, setting, ours[0], theirs[0], SEEDS, STEPS, ours[1] / theirs[1],
        ours[2] / theirs[2], "" if setting == "scratch" else KNOWN,
    ), runs  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--stack", default="", metavar="WORD")
    parser.add_argument("--batch", type=int, metavar="B", help="cells of this batch alone")
    parser.add_argument("--costs", action="store_true", help="costs alone")
    parser.add_argument("--make", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if (
        options.rows.exists()
    ) else []  # fmt: skip
    if options.make:
        return make(rows)
    with options.rows.open("a") as file:

        def keep(kind: str, value: Any, **more: Any) -> None:
            file.write(json.dumps({"kind": kind, **asdict(value), **more}) + "\n")
            file.flush()

        if not options.costs:
            done = {key(r) for r in rows if r["kind"] == "cell"}
            for subject, asked in cells():
                missing = dict.fromkeys(
                    c.stack for c in asked
                    if key(asdict(c)) not in done and options.stack in c.stack
                )  # fmt: skip
                if options.only not in subject.name or not missing:
                    continue
                if options.batch not in (None, asked[0].batch):
                    continue
                asked = [c for c in asked if c.stack in ("none", *missing)]
                began = time.time()
                try:
                    found = measured(subject, asked)
                except VitguardError as error:
                    found = [replace(c, note=f"not run: {error}") for c in asked]
                for cell in (c for c in found if key(asdict(c)) not in done):
                    keep("cell", cell)
                    print(f"{time.time() - began:5.0f} s  {cell}", flush=True)
            return
        known = {(r["stack"], r["setting"]): r for r in rows if r["kind"] == "cost"}
        for setting, stacks in STACKS.items():
            plain: list[Any] = known.get(("none", setting), {}).get("runs", [])
            for stack in stacks:
                wanted = options.only in setting and (stack == "none" or options.stack in stack)
                if (stack, setting) in known or not wanted:
                    continue
                found, runs = cost(stack, setting, plain)
                plain = runs if stack == "none" else plain
                keep("cost", found, runs=runs)
                print(found, flush=True)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("stack", "model", "setting", "batch", "case", "attack"))


def make(rows: list[dict[str, Any]]) -> None:
    """Write the table, every cell that was not run with its reason, and the figure."""
    found = [{k: v for k, v in r.items() if k != "kind"} for r in rows if r["kind"] == "cell"]
    stored = {key(r): r for r in found}
    table = []
    for cell in (c for _, asked in cells() for c in asked):
        missing = asdict(replace(cell, note="not run: no processor time so far"))
        table.append(_short(stored.pop(key(asdict(cell)), missing)))
    table += map(_short, stored.values())  # of other scripts
    costs = [
        _short({k: v for k, v in r.items() if k not in ("kind", "runs")})
        for r in rows if r["kind"] == "cost"
    ]  # fmt: skip
    names = ("torch", "timm", "vitguard")
    made = {
        "schema": 1,
        "date": date.today().isoformat(),
        "versions": {n: _version(n) for n in names},
        "command": "python benchmarks/evidence.py rows.jsonl",
        "cells": table,
        "costs": costs,
    }
    evidence = read_evidence(made)
    TABLE.write_text(json.dumps(made, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- end of table -->")[2]
    PAGE.write_text(f"{before}<!-- table -->\n{page(evidence)}\n<!-- end of table -->{after}")
    if evidence.costs:
        draw(evidence)


def page(evidence: Evidence) -> str:
    """Return the table of docs/advise.md: one line for each stack and model."""
    head = "| setting | model | stack | images | worst, dB from the thumbnail | cells run | cost |"
    figure = "![Leak against cost of each stack.](images/evidence.png)"
    shown = [figure, ""] if evidence.costs else []
    lines = [*shown, f"Made on {evidence.date}.", "", head, "|---|---|---|---:|---:|---|---|"]
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for c in evidence.cells:
        groups.setdefault((c.setting, c.model, c.stack), []).append(c)
    prices = {(c.setting, c.model, c.stack): c for c in evidence.costs}
    left: dict[tuple[str, str], list[str]] = {}
    for (setting, model, stack), each in groups.items():
        run = [c for c in each if c.run]
        if not run:
            left.setdefault((setting, model), []).append(f"`{stack}`")
            continue
        worst = max((c.above for c in run if c.above is not None), default=None)
        fell = "**fell**, " if any(c.leaked for c in run) else ""
        cut = sum(bool(c.cut) for c in run)
        sizes = "/".join(str(n) for n in sorted({c.batch for c in each}))
        price = prices.get((setting, model, stack))
        said = "" if price is None or price.accuracy is None else (
            f"accuracy {price.accuracy:.1%} (undefended {price.plain or 0:.1%}), time x "
            f"{price.time:.1f}, bytes x {price.bytes:.2g}"
        )  # fmt: skip
        above = "nothing to read" if worst is None else f"{worst:+.1f}"
        count = f"{len(run)} of {len(each)}" + (f", {cut} cut" if cut else "")
        lines.append(
            f"| {setting} | {model} | `{stack}` | {sizes} | {fell}{above} | {count} | {said} |"
        )
    if left:
        lines += [
            "",
            "Not run, for lack of processor time; each cell says so in the table of the package:",
            "",
        ]
    for (setting, model), stacks in left.items():
        whole = len(stacks) == sum(group[:2] == (setting, model) for group in groups)
        lines.append(f"- {setting}, {model}: {'every stack' if whole else ', '.join(stacks)}")
    return "\n".join(lines)


def draw(evidence: Evidence) -> None:
    """Draw leak against cost: the worst dB from the thumbnail over the accuracy lost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 4.5), layout="constrained")
    marks, number = {"finetune": "o", "scratch": "s"}, 0
    for setting, mark in marks.items():
        for stack in evidence.stacks(setting):
            above = [c.above for c in stack.measured if c.above is not None]
            lost = [100 * ((c.plain or 0) - (c.accuracy or 0)) for c in stack.costs]
            if not stack.measured or not lost:
                continue
            number += 1
            colour = "#c0392b" if stack.fell else "#1b7f5c" if stack.stood else "#7f8c8d"
            at = max(lost), min(max(above, default=NOTHING), 60.0)
            short = stack.spec.replace("batch-floor+sample-normalisation", "floor+norm")
            axes.plot(*at, mark, color=colour, markersize=8, label=f"{number}  {short}")
            axes.annotate(str(number), at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.axhline(WITHIN, color="#888", linewidth=0.8, linestyle="--")
    axes.set_xlabel("accuracy lost, points (60 steps, trained CIFAR ViT)")
    axes.set_ylabel(
        "worst image, dB above the thumbnail\n(60 and more at 60, nothing to read at -15)"
    )
    axes.set_title(
        "Leak against cost: green stood, red fell, grey shows nothing (attacks cut, or no control);"
        "\ncircles: fine-tuning, squares: from scratch",
        fontsize=9,
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7.5, frameon=False)
    figure.savefig(FIGURE, dpi=110)


def _version(name: str) -> str:
    import vitguard

    return vitguard.__version__ if name == "vitguard" else version(name).partition("+")[0]


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {
        k: round(v, 3) if isinstance(v, float) else v
        for k, v in row.items()
        if v not in (None, "", 0.0)
    }


if __name__ == "__main__":
    main()
