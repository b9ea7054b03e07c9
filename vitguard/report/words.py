"""The wording that every form of a report shares: dB, shares, remarks, baseline, threat model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vitguard.report.finding import Finding
from vitguard.report.pictures import epsilon_text
from vitguard.report.results import AuditResults

__all__ = [
    "NOTHING",
    "accuracies",
    "baseline_text",
    "caution",
    "clean",
    "decibels",
    "remarks",
    "share",
    "threat_text",
]

NOTHING = "-"
"""What stands for a number that does not exist."""


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
    if "craft" in threat:
        text += " It wrote the weights that the client trained on, of the control too."
    for key, value in threat.items():
        items = (
            [clean(v) for v in value] if isinstance(value, list | tuple | set) else [clean(value)]
        )
        text += f" {clean(key).replace('_', ' ').capitalize()}: {', '.join(items) or 'nothing'}."
    return text


def baseline_text(report: AuditResults) -> str:
    """Explain the no-information baseline with this report's numbers."""
    floor = report.baseline
    text = (
        "A guess without information (one flat colour, the mean of other photos, one of them, "
        f"smooth noise) already scores {decibels(floor.psnr)} dB PSNR and "
        f"{decibels(floor.patch_psnr)} dB matched-patch PSNR here if it is lucky. Only what lies "
        "above that is information from the update."
    )
    if floor.thumbnail is None:
        return text
    return (
        f"{text} The thumbnail, every patch flat in its own colour, scores "
        f"{decibels(floor.thumbnail)} dB: above that an attack knows what is inside the patches."
    )


def accuracies(finding: Finding) -> str:
    """Write the accuracies of an attack on the input; empty for every other attack."""
    if finding.clean_accuracy is None and not finding.robust_accuracy:
        return ""
    robust = (finding.robust_accuracy or {}).items()
    parts = [f"accuracy {share(finding.clean_accuracy)} on clean images"]
    parts += [f"{share(v)} at epsilon {clean(epsilon_text(e))}" for e, v in robust]
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
    if finding.verdict != "leaks" and finding.undecided not in finding.reason:
        lines.append(f"undecided: {finding.undecided}")
    return [line for line in (*lines, caution(finding)) if line]


def caution(finding: Finding) -> str:
    """Return a warning against reading more into the verdict than it says; "" without one."""
    exact = finding.details.get("exact")
    if isinstance(exact, str) and exact.startswith("no exact"):
        return f"{exact} for this batch and width; that is not protection"
    return ""
