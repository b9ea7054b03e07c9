"""Does it hold? Published defenses of Vision Transformers, each under an attack that knows it.

    python benchmarks/published.py rows.jsonl                # measures what is not in the file yet
    python benchmarks/published.py rows.jsonl --only soteria # one row, by the name of its file
    python benchmarks/published.py rows.jsonl --make         # writes the page
    python benchmarks/published.py rows.jsonl --draw         # draws its figure, a minute

Each row is a file of `benchmarks/recipes/`. With the data folder (VITGUARD_DATA) the model is the
ViT that others trained on CIFAR-10, and the images are test images; 16 px are the middle of an
image with the middle of the position grid. Without it the weights are random and the images are
scikit-image's photos. Rows are written one by one: a run that is ended goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from damage import cropped
from evidence import CIFAR, SUBJECTS
from recipes import PLACES, Judged, judged
from torch import Tensor, nn

from vitguard import data
from vitguard.audit import audit
from vitguard.core import Batch, Normalization
from vitguard.defenses.base import BatchDefense, Draws
from vitguard.models import build_model
from vitguard.registry import stack_name
from vitguard.report.audit_report import AuditReport

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "published-defenses.md"
PICTURE = ROOT / "docs" / "images" / "published-defenses.png"
MARKS = "<!-- rows -->", "<!-- end of rows -->"
SHOWN = ("soteria", "blockwise_images")
"""Rows that are shown as pictures."""
HEADINGS = {
    "positions": "Positions",
    "keys": "Keys",
    "features": "Features",
    "images": "Images",
    "update": "The update",
}


def subject(side: int, count: int) -> tuple[nn.Module, Normalization, Tensor, Tensor]:
    """Return model, normalisation, pixels in [0, 1] and labels of the attacked images."""
    trained = SUBJECTS[0]
    if os.environ.get("VITGUARD_DATA"):
        model, (pixels, labels) = trained.model(), trained.images(count, (32, 32))
    else:
        torch.manual_seed(0)
        model, pixels = build_model(CIFAR), data.sample_images((32, 32), count=count).pixels
        labels = torch.arange(count) % 10
    if side < 32:
        edge = (32 - side) // 2
        model = cropped(model, side)
        pixels = pixels[..., edge : edge + side, edge : edge + side]
    return model, trained.normalization(model), pixels, labels


def measured(name: str, row: Judged, *, given: Any = None) -> dict[str, Any]:
    """Audit one row beside its control; return it as JSON values.

    Args:
        given: What `subject` returns, in its place.
    """
    began = time.process_time()
    model, normalization, pixels, labels = given or subject(row.side, row.images)
    report = audited(row, model, normalization, pixels, labels)
    control, found = report.findings
    return {
        "name": name,
        "stack": row.stack if isinstance(row.stack, str) else stack_name(list(row.stack)),
        "attack": found.attack,
        "verdict": found.verdict,
        "reason": found.reason,
        "raw": found.psnr and found.psnr.max,
        "matched": found.patch_psnr and found.patch_psnr.max,
        "floor": report.baseline.patch_psnr,
        "thumbnail": report.baseline.thumbnail,
        "control": control.patch_psnr and control.patch_psnr.max,
        "control verdict": control.verdict,
        "identified": found.identified,
        "recovered": found.details.get("recovered"),
        "rung": found.details.get("rung"),
        "images": len(pixels),
        "side": pixels.shape[-1],
        "seconds": time.process_time() - began,
    }


def audited(row: Judged, model: nn.Module, normalization: Any, *batch: Tensor) -> AuditReport:
    """Return the audit of a row: the control, and the defended model."""
    return audit(
        model,
        batch,
        defenses={"published": row.stack if isinstance(row.stack, str) else list(row.stack)},
        attacks=[row.attack],
        batch_size=1,
        normalization=normalization,
    )


def page(rows: list[dict[str, Any]]) -> str:
    """Return what stands between the marks of docs/published-defenses.md."""
    known, table = judged(), {r["name"]: r for r in rows}
    head = "| defense | attack | dB matched | raw | floor | control | patches | verdict |"
    lines = [head, "|---|---|---:|---:|---:|---:|---:|---|"]
    lines += [_line(row, table.get(name)) for name, row in known.items()]
    for place in PLACES:
        lines += ["", f"## {HEADINGS[place]}"]
        for name, row in known.items():
            if row.place == place:
                lines += ["", *_section(name, row, table.get(name))]
    return "\n".join(lines)


def _line(row: Judged, found: dict[str, Any] | None) -> str:
    link = f"[{row.title}](#{_anchor(row.title)})"
    if found is None:
        return f"| {link} | | | | | | | not run: no processor time so far |"
    recovered = "" if found["recovered"] is None else f"{found['recovered']:.0%}"
    return (
        f"| {link} | `{_attack(found)}` | {_db(found['matched'])} | {_db(found['raw'])} | "
        f"{_db(found['floor'])} | {_db(found['control'])} | {recovered} | "
        f"{'**leaks**' if found['verdict'] == 'leaks' else found['verdict']} |"
    )


def _section(name: str, row: Judged, found: dict[str, Any] | None) -> Iterator[str]:
    yield f"### {row.title}"
    yield ""
    yield f"*{row.source}.* Claim: {row.claim}"
    yield ""
    yield f"Rebuilt: {row.rebuilt} Threat: {row.threat}"
    yield ""
    yield (
        row.found if found is None else f"{row.found} Verdict: {found['verdict']} ({_why(found)})."
    )
    yield ""
    yield f"`python benchmarks/published.py new.jsonl --only {name}`"


def _why(found: dict[str, Any]) -> str:
    many = "one image" if found["images"] == 1 else f"{found['images']} images"
    return f"{found['reason'] or 'no reason given'}; {many} of {found['side']} px"


def _attack(found: dict[str, Any]) -> str:
    rung = found["rung"]
    return found["attack"] if rung in (None, found["attack"]) else f"{found['attack']}: {rung}"


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _anchor(title: str) -> str:
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def make(rows: list[dict[str, Any]]) -> None:
    """Write the rows into the page, between its marks."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n{page(rows)}\n{MARKS[1]}{after}")


def draw() -> None:
    """Draw a sample photo under two defenses, on random weights: what is sent, and what is read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    torch.manual_seed(0)
    model = build_model(
        "vit_tiny_patch16_224:img_size=64,patch_size=4,embed_dim=288,depth=1,num_classes=10"
    )
    photo, known = data.sample_images((64, 64), count=2).pixels[1:], judged()
    shown = [("photo", photo[0])]
    for name in SHOWN:
        row, stack = known[name], list(known[name].stack)
        for defense in stack:
            if isinstance(defense, BatchDefense):
                batch = Batch(photo, torch.tensor([3]))
                draws = Draws(torch.Generator().manual_seed(0))
                shown.append(("what the model is shown", defense.transform(batch, draws).images[0]))
        finding = audited(row, model, Normalization(), photo, torch.tensor([3])).findings[1]
        assert finding.images is not None and finding.psnr is not None
        title = f"{row.title},\nread at {finding.psnr.max:.0f} dB"
        shown.append((title, finding.images.reconstruction[0]))
    figure, axes = plt.subplots(1, len(shown), figsize=(2.5 * len(shown), 3))
    for axis, (title, image) in zip(axes, shown, strict=True):
        axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--only", default="", metavar="NAME")
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if (
        options.rows.exists()
    ) else []  # fmt: skip
    if options.make:
        return make(rows)
    if options.draw:
        return draw()
    done = {r["name"] for r in rows}
    with options.rows.open("a") as file:
        for name, row in judged().items():
            if name in done or options.only not in ("", name):
                continue
            found = measured(name, row)
            file.write(json.dumps(found) + "\n")
            file.flush()
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
