"""The wording that every form of a report shares: dB, shares, remarks, baseline, threat model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vitguard.report.corridor import Corridor
from vitguard.report.finding import Finding
from vitguard.report.pictures import epsilon_text
from vitguard.report.results import AuditResults

__all__ = [
    "NOTHING",
    "accuracies",
    "baseline_text",
    "caution",
    "clean",
    "corridor_lines",
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
        if round(percent, 1) == 100:
            return "over 99.9 %" if percent < 100 else f"{percent:.1f} %"
        return f"{percent:.1f} %" if round(percent, 1) != 0 else f"{percent:.2g} %"
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
    if finding.defended and finding.unseen not in finding.reason:
        lines.append(f"beyond any limit in dB: {finding.unseen}")
    return [line for line in (*lines, caution(finding)) if line]


def corridor_lines(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Return the risk corridor of a configuration as (title, sentence), from the bound downwards.

    Empty for a stack without differential privacy.
    """
    of = next((f.corridor for f in findings if f.corridor is not None), None)
    if of is None:
        return []
    return [("Bound", _bound(of)), ("Reached", _reached(findings)), ("Proved", _proved(of))]


def _bound(of: Corridor) -> str:
    if of.bound is None:
        return f"none under {of.defense}, {of.bound_note}."
    spent = "" if of.epsilon is None else f": epsilon {of.epsilon:.3g} at delta {of.delta:.3g}"
    by = f"({of.defense}{spent})"
    known = f"an adversary who would guess the image with probability {share(of.prior)}"
    if of.bound > 0.995:
        told = f"{known} may guess it with up to 100 %: so little noise bounds nothing {by}."
    else:
        most = _rounded(of.bound, up=True)
        told = f"{known} guesses it with at most {most} from this update {by}."
    return _noted(told, of.bound_note)


def _reached(findings: Sequence[Finding]) -> str:
    rates = {f.identified: f for f in findings if f.identified is not None}
    if not rates:
        return "nothing to compare: no attack of this audit made a guess that could be identified."
    best = rates[max(rates)]
    text = f"the best attack of this audit identified {share(best.identified)} of the images"
    if isinstance(bound := best.details.get("reconstruction_bound"), float):
        prior = best.details.get("reconstruction_prior")
        text += f", where a blind guess has {share(prior)} and the bound is {share(bound)}"
    return f"{text}."


def _proved(of: Corridor) -> str:
    if of.proved is None or of.proved_rate is None:
        return f"nothing, {of.proof_note}."
    by = f"{of.observations:,} observations of canaries, {100 * (of.confidence or 0):.5g} % sure"
    if of.broken:
        told = (
            f"epsilon of at least {_down(of.proved)} where {of.epsilon:.3g} is claimed ({by}). The "
            "mechanism does not do what its settings say: do not rely on the bound."
        )
    elif of.proved == 0:
        told = f"nothing: under so much noise no canary shows ({by})."
    else:
        least = _rounded(of.proved_rate, up=False)
        told = (
            f"epsilon of at least {_down(of.proved)} ({by}): a test for the worst image that "
            f"raises {share(of.prior)} false alarms finds it in at least {least}."
        )
    return _noted(told, of.proof_note)


def _noted(told: str, note: str) -> str:
    return f"{told} {note}." if note else told


def _rounded(value: float, *, up: bool) -> str:
    """Write a share as a percentage with one decimal, rounded so that a bound stays one."""
    tenths = (math.ceil if up else math.floor)(1000 * value - (1e-9 if up else -1e-9))
    return f"{tenths / 10:g} %"


def _down(value: float) -> str:
    return "infinity" if math.isinf(value) else f"{math.floor(100 * value) / 100:.2f}"


def caution(finding: Finding) -> str:
    """Return a warning against reading more into the verdict than it says; "" without one."""
    exact = finding.details.get("exact")
    if isinstance(exact, str) and exact.startswith("no exact"):
        return f"{exact} for this batch and width; that is not protection"
    return ""
