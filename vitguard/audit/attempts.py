"""One run of an attack on one view, turned into a scored attempt."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitguard import data
from vitguard.attacks.base import Attack
from vitguard.audit.verdicts import Attempt, labels_overlap
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable, VitguardError
from vitguard.metrics import score

__all__ = ["attempt", "covered", "decoys_for", "run_attack", "seed_of"]

_DECOYS = 100


def attempt(
    attack: Attack,
    view: View,
    empty: Attempt,
    *,
    labels: Tensor,
    patch_size: tuple[int, int],
    decoys: Tensor,
    seed: int,
) -> Attempt:
    """Run an attack and score its guess against `empty.truths`."""
    state, reason, guess, seconds = run_attack(attack, view, seed)
    if guess is None:
        return replace(empty, state=state, reason=reason)
    correct = labels_overlap(guess.labels, labels)
    if not len(guess.images):  # labels only: there is no image to compare
        return replace(empty, guess=guess, labels_correct=correct, seconds=seconds)
    truths = empty.truths.cpu()
    guessed, truths, others = (covered(t, patch_size) for t in (guess.images, truths, decoys))
    scores = score(guessed, truths, patch_size, decoys=others, verified=guess.verified)
    return replace(empty, guess=guess, scores=scores, labels_correct=correct, seconds=seconds)


def run_attack(attack: Attack, view: View, seed: int) -> tuple[Any, str, Guess | None, float]:
    """Run an attack: its state, why there is no guess, the guess on the CPU, and the seconds.

    A failed attack is no evidence, so torch's own errors and unusable images become the state
    `failed` and never end the audit or decide a verdict.
    """
    started = time.perf_counter()
    try:
        guess = attack.run(view, torch.Generator().manual_seed(seed))
    except Blocked as error:
        return "blocked", str(error), None, 0.0
    except NotApplicable as error:
        return "not applicable", str(error), None, 0.0
    except Exception as error:
        if isinstance(error, VitguardError):
            raise
        first = (str(error).splitlines() or [""])[0]
        return "failed", f"the attack failed: {type(error).__name__}: {first}", None, 0.0
    seconds, guess = time.perf_counter() - started, _on_cpu(guess)
    if guess.images.shape[1:] != view.image_shape or not bool(guess.images.isfinite().all()):
        return "failed", "the attack returned no usable image", None, 0.0
    return "guessed", "", guess, seconds


def seed_of(seed: int, index: int, purpose: str) -> int:
    """Return a seed of its own for each purpose: an attack must not repeat the victim's draws."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def covered(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images to whole patches: the model never sees a border that no patch covers."""
    high, wide = (n - n % p for n, p in zip(images.shape[-2:], patch_size, strict=True))
    return images[..., :high, :wide]


def decoys_for(truth: Tensor, seed: int) -> Tensor:
    """Return decoys with as many channels as `truth`: grey ones for a single channel."""
    channels, size = truth.shape[1], (truth.shape[-2], truth.shape[-1])
    colour = truth if channels == 3 else truth.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return data.with_channels(data.decoys(_DECOYS, size, seed=seed, truth=colour), channels)


def _on_cpu(guess: Guess) -> Guess:
    def move(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().cpu()

    return replace(
        guess,
        images=guess.images.detach().cpu(),
        labels=move(guess.labels),
        verified=move(guess.verified),
        shuffled=move(guess.shuffled),
        space=None,
    )
