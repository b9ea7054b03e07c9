"""The audit report as console table, Markdown, picture grid and TensorBoard events."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitguard.errors import expected, missing_extra
from vitguard.report import pictures
from vitguard.report.finding import MEANINGS, Finding, plain

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

    from vitguard.report.audit_report import AuditReport

__all__ = [
    "accuracies",
    "baseline_text",
    "clean",
    "decibels",
    "print_to",
    "remarks",
    "share",
    "threat_text",
    "to_markdown",
    "to_png",
    "to_tensorboard",
]

NOTHING = "-"
STYLES = {
    "leaks": "bold red",
    "resisted": "cyan",
    "blocked": "magenta",
    "not applicable": "dim",
    "inconclusive": "yellow",
}


def decibels(value: float | None, *, signed: bool = False) -> str:
    """Write dB with one decimal; what does not exist is a dash."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:+.1f}" if signed else f"{value:.1f}"


def share(value: float | None) -> str:
    """Write a share in [0, 1] as a percentage, never rounding up to 100 or down to 0."""
    if value is None or not math.isfinite(value):
        return NOTHING
    percent = 100 * value
    rounded = round(percent)
    if rounded in (0, 100) and rounded != percent:
        return f"{percent:.1f} %" if round(percent, 1) not in (0, 100) else f"{percent:.2g} %"
    return f"{rounded} %"


def clean(text: object) -> str:
    """Return `text` on one line; control characters and lone surrogates become a mark."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


def threat_text(threat: Mapping[str, Any]) -> str:
    """Say what the adversary knows and sees, and what this run granted or denied."""
    text = (
        "The adversary reads the update. It knows the architecture, the weights before the step, "
        "the loss, the normalisation, the batch size and which defenses run with which settings; "
        "it does not know random draws or keys."
    )
    for key, value in threat.items():
        items = (
            [clean(v) for v in value] if isinstance(value, list | tuple | set) else [clean(value)]
        )
        text += f" {clean(key).replace('_', ' ').capitalize()}: {', '.join(items) or 'nothing'}."
    return text


def baseline_text(report: AuditReport) -> str:
    """Explain the no-information baseline with this report's numbers."""
    floor = report.baseline
    return (
        "A guess that knows nothing of the images (one flat colour, flat patches or the mean "
        f"image) already scores {decibels(floor.psnr)} dB PSNR and "
        f"{decibels(floor.patch_psnr)} dB matched-patch PSNR here. Only what lies above that is "
        "information from the update."
    )


def accuracies(finding: Finding) -> str:
    """Write the accuracies of an attack on the input; empty for every other attack."""
    if finding.clean_accuracy is None and not finding.robust_accuracy:
        return ""
    robust = (finding.robust_accuracy or {}).items()
    parts = [f"accuracy {share(finding.clean_accuracy)} on clean images"]
    parts += [f"{share(v)} at epsilon {clean(pictures.epsilon_text(e))}" for e, v in robust]
    return ", ".join(parts)


def remarks(finding: Finding) -> list[str]:
    """Return what a reader must know beside the numbers, one short sentence each."""
    details = finding.details
    lines = [accuracies(finding), finding.reason]
    if isinstance(rung := details.get("rung"), str):
        proved = details.get("verified")
        part = f", {share(proved)} of its patches proved" if isinstance(proved, float) else ""
        lines.append(f"best rung: {rung}{part}")
    if isinstance(run := details.get("schedule"), str) and run.startswith(("shortened", "cut")):
        lines.append(f"{run}; a weak result says nothing of the full run")
    if isinstance(bound := details.get("reconstruction_bound"), float):
        prior = share(details.get("reconstruction_prior"))
        lines.append(
            f"identified {share(finding.identified)}, bound {share(bound)} for any attack on this "
            f"one update (a blind guess: {prior})"
        )
    return [line for line in (*lines, _caution(finding)) if line]


def _caution(finding: Finding) -> str:
    """Return what keeps a reader from trusting the verdict too far, "" where nothing does."""
    exact = finding.details.get("exact")
    if isinstance(exact, str) and exact.startswith("no exact"):
        return f"{exact} for this batch and width; that is not protection"
    return ""


def print_to(report: AuditReport, console: Console) -> None:
    """Print headline, one block per defense and the baseline; no line is wider than 80 columns."""
    from rich.padding import Padding
    from rich.text import Text

    def say(text: str, style: str = "", indent: int = 0) -> None:
        console.print(Padding(Text(clean(text), style), (0, 0, 0, indent)), width=_width(console))

    say(f"{report.model.name}: {report.outcome()}", "bold")
    say(report.headline())
    console.print()
    heading = f"  {'attack':<16}{'verdict':<15}{'matched dB':>10}{'gain':>8}{'PSNR':>8}"
    console.print(Text(heading + f"{'ident.':>8}{'seconds':>9}", "dim"), no_wrap=True, crop=False)
    said: set[tuple[str, str]] = set()
    for defense, findings in report.configurations().items():
        control = all(map(report.is_control, findings))
        say("none (the undefended control)" if control else defense, "bold")
        for f in findings:
            line = Text(f"  {clean(f.attack):<16}", no_wrap=True)
            line.append(f"{f.verdict:<15}", STYLES[f.verdict])
            line.append(f"{decibels(f.patch_psnr and f.patch_psnr.max):>10}")
            line.append(f"{decibels(report.gain(f), signed=True):>8}")
            line.append(f"{decibels(f.psnr and f.psnr.max):>8}{share(f.identified):>8}")
            line.append(f"{NOTHING if f.seconds is None else f'{f.seconds:.2f}':>9}")
            console.print(line, crop=False)
            for remark in remarks(f):
                new = (f.attack, remark) not in said  # the first time is enough for a table
                if new or remark in (accuracies(f), _caution(f)):
                    said.add((f.attack, remark))
                    say(remark, "dim", indent=4)
    console.print()
    say(baseline_text(report), "dim")
    for note in report.notes:
        say(f"Note: {note}", "dim")


def _width(console: Console) -> int:
    return min(console.width, 80)


def to_markdown(report: AuditReport) -> str:
    """Return headline, table, reasons, legend, baseline and threat model."""
    lines = [
        f"# vitguard audit of {_cell(report.model.name)}",
        "",
        f"**{_cell(report.outcome())}**",
        "",
        _cell(report.headline()),
        "",
        "| Defense | Attack | Verdict | Matched-patch PSNR | Above baseline | PSNR | Identified "
        "| Control | Seconds |",
        "|---|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for f in report.findings:
        control = NOTHING
        if f.control is not None:
            control = f"{f.control.verdict}, {decibels(f.control.psnr and f.control.psnr.max)} dB"
        cells = [
            f.defense,
            f.attack,
            f.verdict,
            decibels(f.patch_psnr and f.patch_psnr.max),
            decibels(report.gain(f), signed=True),
            decibels(f.psnr and f.psnr.max),
            share(f.identified),
            control,
            NOTHING if f.seconds is None else f"{f.seconds:.2f}",
        ]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    lines += ["", "PSNR in dB, the worst image of each finding.", ""]
    for f in report.findings:
        for remark in remarks(f):
            lines.append(f"- {_cell(f.defense)}, {_cell(f.attack)}: {_cell(remark)}")
    lines += ["", "## How to read this", "", _cell(baseline_text(report)), ""]
    lines += [f"- **{verdict}**: {meaning}" for verdict, meaning in MEANINGS.items()]
    lines += ["", _cell(threat_text(report.threat)), ""]
    lines += [f"- Note: {_cell(note)}" for note in report.notes]
    images = ", ".join(map(_cell, report.images)) or "not named"
    lines += ["", f"Images: {images}. Seed {report.seed}. vitguard {_cell(report.version)}."]
    return "\n".join(lines) + "\n"


def _cell(text: object) -> str:
    """Escape what Markdown, or HTML inside it, would take for markup."""
    line = clean(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#~" else c for c in line)


def to_png(report: AuditReport) -> Image.Image:
    """Return one grid of every finding that reconstructed something."""
    labelled = []
    for finding in report.findings:
        if finding.images is None or finding.images.reconstruction is None:
            continue
        for row in pictures.rows(finding, limit=2):
            value = f", {decibels(row.psnr)} dB" if row.psnr is not None else ""
            label = f"{finding.defense}, {finding.attack}: {finding.verdict}, {row.name}{value}"
            labelled.append((clean(label), row))
    if not labelled:
        raise expected("a report with reconstructed pictures", "none", "Save it as .html or .json.")
    heading = [clean(f"{report.model.name}: {report.outcome()}"), clean(report.headline())]
    return pictures.grid(labelled, heading)


def to_tensorboard(report: AuditReport, directory: str | Path, *, step: int = 0) -> None:
    """Write scalars, pictures and the Markdown text as TensorBoard events."""
    import torch

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing_extra("Writing TensorBoard events", "tensorboard", "tensorboard") from error
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise expected("a folder for TensorBoard", f"{directory} ({error.strerror})") from error
    with SummaryWriter(str(directory)) as writer:
        writer.add_text("report", to_markdown(report), step)
        used = Counter[str]()
        for f in report.findings:
            tag = f"{f.defense}/{f.attack}"
            used[tag] += 1
            if used[tag] > 1:  # an attack that ran with other settings as well
                tag = f"{tag}-{used[tag]}"
            for name, value in _scalars(report, f).items():
                if plain(value) is not None:
                    writer.add_scalar(f"{tag}/{name}", value, step)
            pictures = f.images
            for kind in ("original", "control", "reconstruction") if pictures else ():
                images = getattr(pictures, kind)
                if images is not None:
                    shown = images.detach().float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
                    shown = shown.expand(-1, 3, -1, -1)
                    writer.add_images(f"{tag}/{kind}", shown, step)
            for kind in ("image", "magnified", "adversarial") if f.examples else ():
                shown = [getattr(e, kind).detach().expand(3, -1, -1) for e in f.examples]
                writer.add_images(f"{tag}/{kind}", torch.stack(shown).clamp(0, 1), step)


def _scalars(report: AuditReport, f: Finding) -> dict[str, float | None]:
    robust = {f"robust_accuracy/{k}": v for k, v in (f.robust_accuracy or {}).items()}
    return {
        "psnr_max": f.psnr and f.psnr.max,
        "patch_psnr_max": f.patch_psnr and f.patch_psnr.max,
        "gain": report.gain(f),
        "ssim_max": f.ssim and f.ssim.max,
        "identified": f.identified,
        "labels_correct": f.labels_correct,
        "clean_accuracy": f.clean_accuracy,
        **robust,
    }
