"""One run of an attack on one exposure: whatever goes wrong in it becomes its outcome."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from vitguard.attacks.base import Attack, guess_of
from vitguard.attacks.budget import CutShort
from vitguard.audit.exposure import Exposure, Facts
from vitguard.audit.scale import covered, line_up
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable, Unprotected, VitguardError
from vitguard.metrics import Scores, identification, score
from vitguard.vit import Anatomy

__all__ = [
    "INTERRUPTED",
    "Attempt",
    "Outcome",
    "attempt",
    "labels_overlap",
    "outcome_of",
    "seed_of",
]

INTERRUPTED = "interrupted before its end"
State = Literal["done", "blocked", "not applicable", "failed"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What an attack returned, or why it returned nothing, and the seconds it took.

    Args:
        labels: Those that it read although it returned nothing.
    """

    state: State
    reason: str = ""
    result: Result | None = None
    labels: Tensor | None = None
    seconds: float = 0.0


def outcome_of(run: Callable[[], Result]) -> Outcome[Result]:
    """Run an attack, on an update or on an input, under one rule for what goes wrong.

    A failed attack is no evidence of protection. Every error in it, torch's and refused settings
    included, becomes the state `failed`; the audit goes on. `Unprotected` is raised: there the
    defense did not act, which is no failure of the attack.
    """
    started = time.perf_counter()
    try:
        result = run()
    except Blocked as error:
        return Outcome("blocked", str(error), labels=error.labels)
    except CutShort as error:
        return Outcome("failed", f"it was cut short: {error}", labels=error.labels)
    except NotApplicable as error:
        return Outcome("not applicable", str(error), labels=error.labels)
    except Exception as error:
        if isinstance(error, Unprotected):
            raise
        first = (str(error).splitlines() or [""])[0]
        return Outcome("failed", f"the attack failed: {type(error).__name__}: {first}")
    return Outcome("done", result=result, seconds=time.perf_counter() - started)


@dataclass(frozen=True, eq=False)
class Attempt:
    """One run of an attack on one batch: a guess and what it is worth, or why there is none.

    Args:
        facts: What the audit knows of the batch.
        scores: None where there is no image to compare, or nothing to compare it with.
        labels_correct: Share of labels recovered, in [0, 1].
        error: Relative error of the update that the guess would make; only where the facts are
            not certain.
    """

    facts: Facts
    state: State = "done"
    reason: str = ""
    guess: Guess | None = None
    scores: Scores | None = None
    labels_correct: float | None = None
    error: float | None = None
    mask: Tensor | None = None
    seconds: float = 0.0


def attempt(attack: Attack, facts: Facts, exposure: Exposure, seed: int) -> Attempt:
    """Run an attack and score its guess by what is known of the batch."""
    view = exposure.view
    outcome = outcome_of(lambda: guess_of(attack, view, torch.Generator().manual_seed(seed)))
    empty = Attempt(
        facts, outcome.state, outcome.reason, mask=exposure.mask,
        labels_correct=labels_overlap(outcome.labels, facts.labels),
    )  # fmt: skip
    if outcome.result is None:
        return empty
    guess = _on_cpu(outcome.result)
    if attack.family == "matching":
        guess = replace(guess, fitted=True)
    if guess.images.shape[1:] != view.image_shape or not bool(guess.images.isfinite().all()):
        return replace(empty, state="failed", reason="the attack returned no usable image")
    made = replace(
        empty,
        guess=guess,
        labels_correct=labels_overlap(guess.labels, facts.labels),
        seconds=outcome.seconds,
    )
    if not len(guess.images):  # labels only
        return made
    if not facts.certain:
        made = replace(made, error=_relative_error(view, guess, seed))
    if facts.truths is None or (scale := facts.scale) is None:
        return made
    guessed, truths = (covered(t, facts.patch_size) for t in (guess.images, facts.truths.cpu()))
    scores = score(guessed, truths, facts.patch_size, verified=guess.verified)
    told = identification(
        line_up(guess.images), line_up(facts.truths.cpu()), scale.decoys, scale.uninformed
    )
    return replace(made, scores=replace(scores, identified=told, decoys=len(scale.decoys)))


def labels_overlap(guess: Tensor | None, truth: Tensor | None) -> float | None:
    """Return the share of labels recovered, as multisets, in [0, 1]; None where one is missing."""
    if guess is None or truth is None or truth.is_floating_point() or guess.shape != truth.shape:
        return None
    if guess.is_floating_point() or int(guess.min()) < 0:
        return None
    size = int(max(guess.max(), truth.max())) + 1
    counts = [torch.bincount(x.cpu().long(), minlength=size) for x in (guess, truth)]
    return int(torch.minimum(*counts).sum()) / len(truth)


def seed_of(seed: int, index: int, purpose: str) -> int:
    """Return a seed of its own for each purpose: an attack must not repeat the victim's draws."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _relative_error(view: View, guess: Guess, seed: int) -> float | None:
    """Relative error of what the guess would send: of all tensors, or of the earliest one.

    The larger one; None where it cannot be simulated, or where no early tensor was sent: the last
    layers say little of pixels.
    """
    labels, batch = guess.labels, view.update.batch_size
    if labels is None or not len(labels) == len(guess.images) == batch or not view.update.tensors:
        return None
    like = next(view.model.parameters())
    images = view.normalization.apply(guess.images.to(like.device)).to(like)
    generator = torch.Generator().manual_seed(seed)
    try:
        made = view.simulate(images, labels.to(like.device), generator).tensors
    except VitguardError:
        return None
    if not (early := [name for name in _early(Anatomy.of(view.model)) if name in made]):
        return None

    def error(names: Iterable[str]) -> float:
        known = {k: view.update.tensors[k].double() for k in names}
        gap = sum(float((made[k].detach() - t).square().sum()) for k, t in known.items())
        total = sum(float(t.square().sum()) for t in known.values())
        return (gap / total) ** 0.5 if total else math.inf  # zeros prove nothing

    ratio = max(error(made), error(early[:1]))
    return ratio if math.isfinite(ratio) else None


def _early(anatomy: Anatomy) -> list[str]:
    """Return the tensors whose gradient is a sum over patches or tokens of the first block."""
    if not anatomy.blocks:
        return [anatomy.patch_weight]
    block = anatomy.blocks[0]
    layers = [f"{layer}.weight" for layer in (block.proj, block.fc1)]
    return [anatomy.patch_weight, *block.qkv, *layers]


def _on_cpu(guess: Guess) -> Guess:
    moved: dict[str, Any] = {
        name: None if (value := getattr(guess, name)) is None else value.detach().cpu()
        for name in ("images", "labels", "verified", "shuffled")
    }
    others = {name: images.detach().cpu() for name, images in guess.others.items()}
    return replace(guess, **moved, others=others, space=None)
