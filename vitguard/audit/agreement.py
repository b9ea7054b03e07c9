"""Whether what is stated of a received update explains it: otherwise nothing in it has resisted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vitguard.attacks.labels import pair_labels, try_labels
from vitguard.audit.victim import Victim
from vitguard.core import Update, View
from vitguard.defenses.base import Defense
from vitguard.errors import VitguardError
from vitguard.randomness import seeded
from vitguard.vit import Anatomy

__all__ = ["disagreement"]

Tensors = Mapping[str, Tensor]
_DRAWS = 3
_NEAR = 0.3
"""Of its length: how far an update may be from what is stated, beside what defenses draw.

Images stored as JPEG or resized, and dropout, stay below; other weights make 1.4.
"""
_LEAST = 1e-30
_CLASSES = 20
"""Up to so many are tried for one image."""
_SPREAD = 1.25
"""How much farther it may be than the draws of the stack are from each other."""


def disagreement(
    victim: Victim, stack: Sequence[Defense], update: Update, view: View, labels: Tensor | None
) -> str:
    """Return why an update is not what stated weights, images and stack make; "" where it may be.

    The victim makes its own update of the images a few times, with other draws of the stack. The
    received one must be about as far from these as they are from each other. Where noise is all
    that both hold, that is so whatever was stated: nothing could tell.

    Args:
        victim: With the stated images. Its own labels are tried where none are given and the
            update tells none.
        view: What the adversary sees of the update.
    """
    received = _readable(update)
    tried = [labels] if labels is not None else _labels(victim, view)
    try:
        first = [(one, _made(victim, stack, one, 0)) for one in tried]
        chosen, made = min(first, key=lambda pair: _distance(received, pair[1]))
        again = [made, *(_made(victim, stack, chosen, i) for i in range(1, _DRAWS))]
    except VitguardError as error:
        return f"the stated images and stack make no update ({error})"
    apart = max(_distance(a, b) for a, b in itertools.combinations(again, 2))
    gap = min(_distance(received, one) for one in again)
    length = max(_length(one) for one in again)
    if gap <= _SPREAD * apart + _NEAR * length:
        return ""
    return (
        "the update is not what the stated weights, images and stack make: it is "
        f"{gap / max(length, _LEAST):.0%} of its length away. Check the checkpoint, the images, "
        "mean and deviation"
    )


def _labels(victim: Victim, view: View) -> list[Tensor]:
    """Return the labels that an update tells; else each class of one image, or the victim's own."""
    with seeded(victim.seed, victim.model):
        told = try_labels(view, torch.Generator().manual_seed(victim.seed))
        if told is not None and len(told) == victim.size:
            return [pair_labels(view, victim.pixels, told).cpu()]
    classes = Anatomy.of(victim.model).classes or 0
    if victim.size == 1 and classes <= _CLASSES:
        return [torch.tensor([c]) for c in range(classes)] or [victim.labels]
    return [victim.labels]


def _made(victim: Victim, stack: Sequence[Defense], labels: Tensor, draw: int) -> Tensors:
    of_it = replace(victim, labels=labels, seed=victim.seed + 1 + draw)
    return _readable(of_it.made(stack)[1])


def _readable(update: Update) -> Tensors:
    return {n: t.double().cpu() for n, t in update.tensors.items() if not n.startswith("vitguard.")}


def _distance(one: Tensors, other: Tensors) -> float:
    """Return the 2-norm of the difference of what both hold."""
    return _length({n: t - other[n] for n, t in one.items() if n in other})


def _length(tensors: Tensors) -> float:
    return sum(float(t.square().sum()) for t in tensors.values()) ** 0.5
