"""What the attempts of one attack measured, and the pictures of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitguard.audit.attempts import Attempt
from vitguard.data import pictured
from vitguard.metrics import mask_score
from vitguard.report.finding import Mask, Pictures, Summary

__all__ = ["guesses", "measurements", "pictures", "unmeasured"]

_PICTURES = 4


def measurements(guessed: Sequence[Attempt]) -> dict[str, Any]:
    """Return the fields of a finding that scored guesses fill."""

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


def unmeasured(guessed: Sequence[Attempt]) -> dict[str, Any]:
    """Return the fields of a finding whose true images are not known."""
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


def pictures(guessed: Sequence[Attempt], controls: Sequence[Attempt]) -> Pictures:
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


def guesses(guessed: Sequence[Attempt]) -> Pictures:
    """Return the reconstructions alone, where the true images are not known."""
    images = [a.guess.images for a in guessed if a.guess is not None]
    return Pictures(reconstruction=pictured(torch.cat(images).float())[:_PICTURES])
