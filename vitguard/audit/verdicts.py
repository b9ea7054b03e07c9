"""From attempts of one attack to a verdict beside the control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitguard.attacks.base import Attack
from vitguard.audit.attempts import Attempt
from vitguard.data import pictured
from vitguard.metrics import identification_p, mask_score
from vitguard.report.finding import LEAK_GAIN, Control, Finding, Mask, Pictures, Summary, Verdict

__all__ = ["LABELS_ONLY", "finding_of", "rivals_of"]

CHANCE = 0.01
CROWDING = 5
"""How many times more often than 1 / (decoys + 1) a guess without information may hit.

Truths are whole photos, decoys are crops of a few: smooth noise hit up to 3.7 times as often, and
hits within a batch go together (4,800 batches of 1 to 7 photos, 32 x 32).
"""
LABELS_ONLY = "recovers labels, no image"
_PICTURES = 4
_ALIKE = 40.0
"""PSNR in dB from which a guess is the image that was given; a flat one is no leak by its gain."""
_REPRODUCED = 0.05
"""Relative error of the simulated update up to which a guess explains the update."""


def finding_of(
    defense: str,
    attack: Attack,
    attempts: Sequence[Attempt],
    control: Finding | None,
    control_attempts: Sequence[Attempt],
) -> Finding:
    """Return the finding of one attack on one configuration over all batches.

    Args:
        control: The finding of the same attack on the undefended model, None for the control.
        control_attempts: What that finding is of, for the pictures.
    """
    base = Finding(
        defense, attack.name, "inconclusive", settings=attack.settings(),
        control=None if control is None else Control(control.verdict, control.psnr),
    )  # fmt: skip
    guessed = [a for a in attempts if a.guess is not None and len(a.guess.images)]
    if not guessed and (labelled := [a for a in attempts if a.guess is not None]):
        return _labels_only(base, labelled)
    if not guessed:
        first = next((a for a in attempts if a.state == "failed"), attempts[0])
        verdicts: dict[str, Verdict] = {"blocked": "blocked", "not applicable": "not applicable"}
        return replace(base, verdict=verdicts.get(first.state, "inconclusive"), reason=first.reason)
    scored = [a for a in guessed if a.scores is not None]
    measured = replace(base, **(_measurements(scored) if scored else _unmeasured(guessed)))
    verdict, reason = _verdict(measured, scored, control) if scored else _truth_unknown(guessed)
    if why := next((e for a in guessed if (e := _explanation(a))), ""):
        # whatever the images are said to be: its guess is what the update was made of
        if scored and verdict != "leaks" and (measured.psnr is None or measured.psnr.max < _ALIKE):
            why += ", and is none of the images that were given: check them, mean and deviation"
        if verdict != "leaks":
            verdict, reason = "leaks", why
    if failed := [a for a in attempts if a not in guessed]:
        reason = f"{reason}; {len(failed)} of {len(attempts)} batches: {failed[0].reason}"
        # the control may leak on the very batches that were not attacked here
        verdict = "inconclusive" if verdict == "resisted" else verdict
    pictures = _pictures(scored, control_attempts) if scored else _guesses(guessed)
    return replace(measured, verdict=verdict, reason=reason, images=pictures)


def _labels_only(base: Finding, attempts: Sequence[Attempt]) -> Finding:
    """Return the finding of an attack that makes no claim on pixels: no metric, no verdict."""
    known = [a.labels_correct for a in attempts if a.labels_correct is not None]
    share = sum(known) / len(known) if known else None
    right = "" if share is None else f" ({100 * share:.0f} % of the labels right)"
    return replace(
        base,
        reason=f"{LABELS_ONLY}{right}",
        labels_correct=share,
        seconds=sum(a.seconds for a in attempts) / len(attempts),
        details=dict(attempts[0].guess.details) if attempts[0].guess else {},
    )


def _explanation(attempt: Attempt) -> str:
    """Return why the update itself says that a guess is right, "" where it does not.

    A guess that was fitted to the update reproduces it, with images that are nothing like the
    truth. Where the audit made the update, the truth decides.
    """
    guess, error = attempt.guess, attempt.error
    if attempt.facts.certain or guess is None:
        return ""
    if error is not None and error <= _REPRODUCED and not guess.fitted:
        return f"the reconstruction reproduces the update to {100 * error:.2g} %"
    if guess.verified is not None and bool(guess.verified.any()):
        proved, patches = int(guess.verified.sum()), guess.verified.numel()
        return f"{proved} of {patches} patches proved by the attack itself"
    return ""


def _truth_unknown(guessed: Sequence[Attempt]) -> tuple[Verdict, str]:
    error = guessed[0].error
    why = "the guess does not reproduce the update"
    if error is None:
        why = "whether the guess reproduces the update could not be checked"
    elif error <= _REPRODUCED:
        why = f"the guess was fitted to the update (to {100 * error:.2g} %): others may fit as well"
    return "inconclusive", f"the truth is not known and {why}"


def rivals_of(finding: Finding) -> int:
    """Return beside how many equal rivals a guess without information stands, crowding counted."""
    return (finding.decoys or 0) // CROWDING - 1


def _verdict(
    measured: Finding, guessed: Sequence[Attempt], control: Finding | None
) -> tuple[Verdict, str]:
    gain = measured.gain
    if gain is not None and gain >= LEAK_GAIN:
        return "leaks", f"{gain:.1f} dB above the best no-information guess"
    hits = [bool(h) for a in guessed for h in a.scores.identified]  # type: ignore[union-attr]
    rivals = rivals_of(measured)
    chance = identification_p(sum(hits), len(hits), rivals) if rivals > 0 else 1.0
    if chance < CHANCE:
        return "leaks", f"{sum(hits)} of {len(hits)} images told from {measured.decoys} decoys"
    found = [a.scores.recovered for a in guessed if a.scores and a.scores.recovered is not None]
    if exact := sum(int(patches.sum()) for patches in found):
        total = sum(patches.numel() for patches in found)
        return "leaks", f"{exact} of {total} patches recovered, each proved by the attack itself"
    if control is None:
        return "inconclusive", "the undefended model does not leak to this attack"
    left = {rung for a in guessed if a.guess for rung in a.guess.details.get("unfinished", ())}
    if control.verdict == "leaks" and left:
        return "inconclusive", f"it ended before {', '.join(sorted(left))}: allow more"
    still = [int(n) for a in guessed if a.mask is not None for n in a.mask.sum(1) if n < 2]
    if control.verdict == "leaks" and still:
        why = "warm-up, ratio or probability"
        return "inconclusive", f"the shuffle moved no patch of {len(still)} images ({why})"
    if control.verdict == "leaks":
        return "resisted", "the undefended control leaks to the same attack"
    return "inconclusive", f"the undefended control does not leak either ({control.verdict})"


def _measurements(guessed: Sequence[Attempt]) -> dict[str, Any]:
    def gather(field: str) -> Summary | None:
        return Summary.of(torch.cat([getattr(a.scores, field).flatten() for a in guessed]))

    identified = torch.cat([a.scores.identified.double() for a in guessed])  # type: ignore[union-attr]
    labels = [a.labels_correct for a in guessed if a.labels_correct is not None]
    worst = max(guessed, key=lambda a: float(a.scores.patch_psnr.max()))  # type: ignore[union-attr]
    assert worst.guess is not None
    details = dict(worst.guess.details)
    if worst.guess.verified is not None:
        details["verified"] = float(worst.guess.verified.double().mean())
    if (patches := worst.scores.recovered) is not None:  # type: ignore[union-attr]
        details["recovered"] = float(patches.double().mean())
    gains = [a.scores.patch_psnr - a.facts.scale.baseline.patch_psnr for a in guessed]  # type: ignore[union-attr]
    return {
        "gain": float(torch.cat(gains).max()),
        **{name: gather(name) for name in ("psnr", "patch_psnr", "ssim", "mse", "fft2d")},
        "identified": float(identified.mean()),
        "labels_correct": sum(labels) / len(labels) if labels else None,
        "mask": _mask(guessed),
        "decoys": guessed[0].scores.decoys,  # type: ignore[union-attr]
        "seconds": sum(a.seconds for a in guessed) / len(guessed),
        "details": details,
    }


def _unmeasured(guessed: Sequence[Attempt]) -> dict[str, Any]:
    """Return what can be said of guesses whose truth nobody knows."""
    first = guessed[0]
    assert first.guess is not None
    details = {**first.guess.details, "update_error": first.error}
    if first.guess.verified is not None:
        details["verified"] = float(first.guess.verified.double().mean())
    return {"seconds": sum(a.seconds for a in guessed) / len(guessed), "details": details}


def _mask(guessed: Sequence[Attempt]) -> Mask | None:
    scores = [
        mask_score(a.guess.shuffled.cpu(), a.mask.cpu(), a.scores.patch_assignment)  # type: ignore[union-attr]
        for a in guessed
        if a.mask is not None and a.guess is not None and a.guess.shuffled is not None
    ]
    precision = [s.precision for s in scores if s.precision is not None]
    recall = [s.recall for s in scores if s.recall is not None]
    if not precision or not recall:
        return None
    return Mask(sum(precision) / len(precision), sum(recall) / len(recall))


def _pictures(guessed: Sequence[Attempt], controls: Sequence[Attempt]) -> Pictures:
    """Return the closest reconstructions beside original and control, in the report's order."""

    def shown(attempts: Sequence[Attempt]) -> dict[str, Tensor]:
        return {
            name: pictured(a.guess.images[int(a.scores.patch_assignment[i])].float().cpu())
            for a in attempts
            if a.guess is not None and a.scores is not None
            for i, name in enumerate(a.facts.names)
        }

    closeness = {
        name: float(a.scores.patch_psnr[i])  # type: ignore[union-attr]
        for a in guessed
        for i, name in enumerate(a.facts.names)
    }
    originals = {
        name: a.facts.truths[i]  # type: ignore[index]
        for a in guessed
        for i, name in enumerate(a.facts.names)
    }
    closest = sorted(closeness, key=lambda name: -closeness[name])[:_PICTURES]
    names = [name for name in originals if name in closest]
    made, control = shown(guessed), shown(controls)
    return Pictures(
        original=torch.stack([pictured(originals[n].float().cpu()) for n in names]),
        control=torch.stack([control[n] for n in names]) if set(names) <= control.keys() else None,
        reconstruction=torch.stack([made[n] for n in names]),
        names=tuple(names),
    )


def _guesses(guessed: Sequence[Attempt]) -> Pictures:
    images = [a.guess.images for a in guessed if a.guess is not None]
    return Pictures(reconstruction=pictured(torch.cat(images).float())[:_PICTURES])
