"""A report as GitHub-flavoured Markdown, without pictures."""

from __future__ import annotations

from vitguard.report.finding import MEANINGS
from vitguard.report.results import AuditResults
from vitguard.report.words import (
    NOTHING,
    baseline_text,
    clean,
    corridor_lines,
    decibels,
    remarks,
    share,
    threat_text,
)

__all__ = ["escaped", "to_markdown"]


def to_markdown(report: AuditResults) -> str:
    """Return headline, table, reasons, legend, baseline and threat model."""
    lines = [
        f"# vitguard audit of {escaped(report.model.name)}",
        "",
        f"**{escaped(report.outcome())}**",
        "",
        escaped(report.headline()),
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
            f.configuration,
            f.attack,
            f.verdict,
            decibels(f.patch_psnr and f.patch_psnr.max),
            decibels(report.gain(f), signed=True),
            decibels(f.psnr and f.psnr.max),
            share(f.identified),
            control,
            NOTHING if f.seconds is None else f"{f.seconds:.2f}",
        ]
        lines.append(f"| {' | '.join(map(escaped, cells))} |")
    lines += ["", "PSNR in dB, the worst image of each finding.", ""]
    for f in report.findings:
        for remark in remarks(f):
            lines.append(f"- {escaped(f.configuration)}, {escaped(f.attack)}: {escaped(remark)}")
    for configuration, findings in report.configurations().items():
        if corridor := corridor_lines(findings):
            lines += ["", f"## What differential privacy bounds: {escaped(configuration)}", ""]
            lines += [f"- **{title}**: {escaped(sentence)}" for title, sentence in corridor]
    lines += ["", "## How to read this", "", escaped(baseline_text(report)), ""]
    lines += [f"- **{verdict}**: {meaning}" for verdict, meaning in MEANINGS.items()]
    lines += ["", escaped(threat_text(report.threat)), ""]
    lines += [f"- Note: {escaped(note)}" for note in report.notes]
    lines += ["", f"What to use: {escaped(report.advice)}"] if report.advice else []
    images = ", ".join(map(escaped, report.images)) or "not named"
    lines += ["", f"Images: {images}. Seed {report.seed}. vitguard {escaped(report.version)}."]
    return "\n".join(lines) + "\n"


def escaped(text: object) -> str:
    """Escape what Markdown, or HTML inside it, would take for markup."""
    line = clean(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#~" else c for c in line)
