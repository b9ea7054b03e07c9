"""What one gradient of a real pretrained ViT gives away: DINOv2-small with a fresh head, photos.

Sizes, batches, and stacks of fixed positions and shuffles, each met by the ladder beside its own
undefended control. A row that stands in the file is not run again.

    VITGUARD_DATA=... python benchmarks/pretrained.py rows.jsonl [--seconds 20] [--only "112 px"]
    python benchmarks/pretrained.py rows.jsonl --table
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vitguard import data
from vitguard.attacks.ladder import Ladder
from vitguard.audit import audit
from vitguard.models import build_model, load_checkpoint, normalization_of

STACKS = {
    "learnable": "",
    "frozen": "positions:kind=frozen",
    "sincos": "positions:kind=sincos",
    "frozen, shuffle 0.3": "positions:kind=frozen+shuffle:ratio=0.3",
    "frozen, shuffle 0.7": "positions:kind=frozen+shuffle:ratio=0.7",
    "sincos, shuffle 0.7": "positions:kind=sincos+shuffle:ratio=0.7",
}
CASES = list(product((112, 224), (1, 2, 4), STACKS))


def row(size: int, count: int, name: str, seconds: float) -> dict[str, Any]:
    """Attack one batch of photos that nobody tuned on."""
    torch.manual_seed(0)
    model = build_model(f"vit_small_patch14_dinov2:img_size={size},num_classes=10")
    folder = Path(os.environ["VITGUARD_DATA"])
    load_checkpoint(model, folder / "weights" / "dinov2_small_timm_fp16.safetensors")
    files = sorted((folder / "photos").iterdir())[20 : 20 + count]
    pixels = data.load_images(files, (size, size)).pixels
    began = time.process_time()
    report = audit(
        model, (pixels, torch.arange(count)),
        defenses=STACKS[name] or (), attacks=[Ladder(seconds=seconds)],
        normalization=normalization_of(model),
    )  # fmt: skip
    found = report.findings[-1]
    return {
        "key": f"{size} px | {count} | {name}",
        "verdict": found.verdict,
        "psnr": found.psnr.min if found.psnr else None,
        "gain": found.gain,
        "identified": found.identified,
        "verified": found.details.get("verified"),
        "rung": found.details.get("rung"),
        "reason": found.reason,
        "floors": [report.baseline.psnr, report.baseline.thumbnail],
        "nominal seconds": seconds,
        "seconds": round(time.process_time() - began, 1),
    }


def cell(found: dict[str, Any] | None) -> str:
    """Return one cell of the table."""
    if found is None:
        return "not run"
    parts = [found["verdict"]]
    if found["gain"] is not None:
        parts.append(f"gain {found['gain']:+.1f} dB")
    if found["verified"]:
        parts.append(f"{found['verified']:.0%} of patches proved")
    return ", ".join(parts)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [f"| size, batch | {' | '.join(STACKS)} |", "|---" * (len(STACKS) + 1) + "|"]
    for size, count in dict.fromkeys(c[:2] for c in CASES):
        cells = [cell(rows.get(f"{size} px | {count} | {name}")) for name in STACKS]
        lines.append(f"| {size} px, B = {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="nominal, of the ladder")
    parser.add_argument("--only", default="", help="part of a key")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    text = options.rows.read_text() if options.rows.exists() else ""
    rows = {r["key"]: r for r in map(json.loads, text.splitlines())}
    if options.table:
        print(table(rows))
        return
    for size, count, name in CASES:
        key = f"{size} px | {count} | {name}"
        if key in rows or options.only not in key:
            continue
        made = row(size, count, name, options.seconds)
        with options.rows.open("a") as file:
            file.write(json.dumps(made) + "\n")
        print(key, made["verdict"], made["gain"], made["reason"][:90], made["seconds"], flush=True)


if __name__ == "__main__":
    main()
