"""What an update of adapters, the head, the last block or everything gives away, beside the plan.

    python benchmarks/peft_table.py --out rows.jsonl [--only WORD] [--seconds S] [--matching WORD]
                                    [--iterations N]
    python benchmarks/peft_table.py --out rows.jsonl --table

Each cell is one audit without defenses: the ladder of exact attacks within a budget of work, and
for keys that hold a word of `--matching` also gradient matching, by `--iterations` or a CPU's
budget (the iterations that were made stand in the table where they are not 200). A run goes on
where the file ends, and a line that was cut off by its end is run again; a cell that is not in the
file is `not run` in the table. The trained models and the images are those of the folder that
VITGUARD_DATA names; ViT-B/16 has random weights. Adapters are as after some steps: before the first
one, B of LoRA and the last layer of a bottleneck are zero, and most of the update with them. The
head is trained in every cell, as it is for new classes. A B = 4 row counts the best of its images.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import red_team
import torch
from red_team import CIFAR, MODELS
from torch import Tensor, nn

from vitguard.attacks.ladder import Ladder
from vitguard.audit import audit
from vitguard.models import normalization_of
from vitguard.plan import plan_report
from vitguard.registry import parse_attack
from vitguard.vit import Anatomy

TRAINED = {
    "LoRA r=4 on qkv": "lora:r=4/head",
    "LoRA r=16 on qkv": "lora:r=16/head",
    "adapters": "adapters:r=16/head",
    "head": "head",
    "last block": "last-block/head",
    "all": "all",
}
MODELS["ViT-B/16"] = ("", "vit_base_patch16_224:num_classes=10", 224)
CROP = "cifar a, crop 16"
NAMES = {
    CROP: "CIFAR ViT, trained, crops of 16 px",
    "cifar a": "CIFAR ViT, trained, 32 px",
    "DINOv2-small": "DINOv2-small, 112 px",
    "ViT-B/16": "ViT-B/16, random, 224 px",
}
ITERATIONS = 200  # of matching


class Bottleneck(nn.Module):
    """An adapter: down to `rank`, GELU, up again."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.nn.functional.gelu(self.down(x)))


def add_adapter(module: Any, _: Any, output: Tensor) -> Tensor:
    """Add the adapter of an MLP to what it gives."""
    return output + module.adapter(output)


def add_beside(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """Add the adapter of what an MLP reads to what it gives."""
    return output + module.adapter(inputs[0])


def prepared(model: nn.Module, what: str) -> nn.Module:
    """Return the model with adapters, and only what is trained asking for a gradient.

    Args:
        what: A value of `TRAINED`, `lora-fc1:r=N`, `beside:r=N` (adapters of what the MLP reads) or
            `attention:r=N` (of what the attention gives).
    """
    anatomy = Anatomy.of(model)
    kind, _, rank = what.partition("/")[0].partition(":r=")
    torch.manual_seed(0)
    beside = {"lora": ["qkv"], "lora-fc1": ["fc1"]}.get(kind)
    if beside:
        config = peft.LoraConfig(r=int(rank), target_modules=beside, modules_to_save=["head"])
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        return model
    chosen = {"last-block": anatomy.blocks[-1].name + ".", "head": "head.", "all": ""}.get(kind)
    for name, parameter in model.named_parameters():
        head = name.startswith("head.")
        parameter.requires_grad_(head or (chosen is not None and name.startswith(chosen)))
    if kind in ("adapters", "beside", "attention"):
        for block in anatomy.blocks:
            of = block.attention if kind == "attention" else block.mlp
            part: Any = model.get_submodule(of)
            part.adapter = Bottleneck(anatomy.width, int(rank))
            nn.init.normal_(part.adapter.up.weight, std=0.02)
            part.register_forward_hook(add_beside if kind == "beside" else add_adapter)
    return model


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    model: str
    trained: str
    batch: int

    @property
    def key(self) -> str:
        """What names it in the file."""
        return f"{self.model} | {self.trained} | {self.batch}"


def grid() -> Iterator[Cell]:
    """Yield every cell, single images first."""
    for batch in (1, 4):
        for model in NAMES:
            for trained in TRAINED:
                yield Cell(model, trained, batch)


def network(name: str) -> nn.Module:
    """Return a model of the table without adapters."""
    if name != CROP:
        return red_team.model_of(name)
    model: Any = red_team.model_of("cifar a")
    model.set_input_size(img_size=16)
    return model


def images(cell: Cell) -> tuple[Tensor, Tensor]:
    """Return the batch: CIFAR-10 test images, or photos."""
    case = red_team.Case("cifar a" if cell.model == CROP else cell.model, batch=cell.batch)
    pixels, labels = red_team.batch_of(case)
    return (pixels[..., 8:24, 8:24] if cell.model == CROP else pixels), labels


def measured(cell: Cell, attack: Any) -> dict[str, Any]:
    """Return what one attack got of one update."""
    plain = network(cell.model)
    normalization = CIFAR if "cifar" in cell.model else normalization_of(plain)
    started = time.process_time()
    report = audit(
        prepared(plain, TRAINED[cell.trained]), images(cell), attacks=[attack],
        normalization=normalization,
    )  # fmt: skip
    (found,), floor = report.findings, report.to_json()["baseline"]
    return {
        "key": cell.key,
        "attack": found.attack,
        "verdict": found.verdict,
        "reason": found.reason,
        "raw": found.psnr and found.psnr.max,
        "matched": found.patch_psnr and found.patch_psnr.max,
        "gain": report.gain(found),
        "floor": floor,
        "labels": found.labels_correct,
        "rung": found.details.get("rung"),
        "verified": found.details.get("verified"),
        "iterations": found.details.get("iterations"),
        "undecided": found.undecided,
        "settings": found.to_json()["settings"],
        "seconds": round(time.process_time() - started, 1),
    }


def attacks(seconds: float, iterations: int | None, *, matching: bool) -> list[Any]:
    """Return what is run on a cell."""
    every: list[Any] = [Ladder(seconds=seconds)]
    if matching:
        chosen = "" if iterations is None else f":iterations={iterations}"
        every.append(parse_attack(f"inverting{chosen}", fast=True))
    return every


@functools.cache
def planned(model: str, trained: str) -> str:
    """Return the exact attacks that `vitguard plan --train` says remain."""
    spec = MODELS["cifar a" if model == CROP else model][1]
    spec = spec.replace("img_size=32", "img_size=16") if model == CROP else spec
    report = plan_report(spec, (), train=TRAINED[trained])
    return ", ".join(name for name in report.remaining() if name != "matching") or "none"


def shown(line: dict[str, Any] | None) -> str:
    """Return a cell: the best image in dB, its gain over guesses without information, the rung."""
    if line is None:
        return "not run, for lack of time"
    labels = "" if line["labels"] is None else f"; labels {line['labels']:.0%}"
    if line["matched"] is None:
        untried = "containment: untried" in line["reason"]
        return ("`containment` untried" if untried else line["verdict"]) + labels
    rung = f" `{line['rung']}`" if line["rung"] else ""
    proved = f", {line['verified']:.0%} proved" if line["verified"] else ""
    taken = line.get("iterations") or ITERATIONS
    fewer = "" if taken == ITERATIONS else f"; {taken} iterations"
    leaks = "**leaks** " if line["verdict"] == "leaks" else ""
    return f"{leaks}{line['matched']:.1f} ({line['gain']:+.1f}){rung}{proved}{labels}{fewer}"


def table(lines: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: one table for each attack, one row for each update."""
    found = {(line["key"], line["attack"]): line for line in lines}
    blocks = []
    for attack in ("ladder", "inverting"):
        plan = " `plan --train` says |" if attack == "ladder" else ""
        rows = [
            f"| `{attack}`, trained, with the head |{plan} B = 1 | B = 4 |",
            f"|---|{'---|' if plan else ''}---|---|",
        ]
        for model, trained in itertools.product(NAMES, TRAINED):
            cells = [Cell(model, trained, batch) for batch in (1, 4)]
            parts = [shown(found.get((cell.key, attack))) for cell in cells]
            said = [planned(model, trained)] if plan else []
            if trained == next(iter(TRAINED)):
                floors = [_floors(cell, found) for cell in cells]
                gap = [""] if plan else []
                rows.append(f"| {' | '.join([f'**{NAMES[model]}**', *gap, *floors])} |")
            rows.append(f"| {' | '.join([trained, *said, *parts])} |")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def _floors(cell: Cell, found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Return what guesses without information and the thumbnail get."""
    some = found.get((cell.key, "ladder")) or found.get((cell.key, "inverting"))
    return (
        "" if some is None else "floors {patch_psnr:.1f}, {thumbnail:.1f}".format(**some["floor"])
    )


def finished(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file; one that was cut off is taken out of it."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def main() -> None:
    """Run the cells that the file lacks, or print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="part of a key")
    parser.add_argument("--seconds", type=float, default=30.0, help="nominal, of the ladder")
    parser.add_argument("--matching", nargs="*", default=[], metavar="WORD", help="parts of keys")
    parser.add_argument("--iterations", type=int, help="of matching, in place of a budget")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    lines = finished(options.out)
    if options.table:
        print(table(lines))
        return
    known = {(line["key"], line["attack"]) for line in lines}
    for cell in grid():
        if options.only not in cell.key:
            continue
        also = any(word in cell.key for word in options.matching)
        for attack in attacks(options.seconds, options.iterations, matching=also):
            if (cell.key, attack.name) in known:
                continue
            line = measured(cell, attack)
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line["key"], line["attack"], line["verdict"], line["matched"], line["reason"],
                  line["seconds"], flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
