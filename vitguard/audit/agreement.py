"""Whether what is stated of a received update explains it: otherwise nothing in it has resisted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vitguard.attacks.labels import pair_labels, try_labels
from vitguard.audit.scale import DECOYS, decoys_for, enlarged
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
_ROUNDING = 1e-4
"""Of its length: up to so much draws differ by rounding alone."""
_NEARER = 0.8
"""How near it may be, as a share of the least distance between draws of the stack.

An update without the noise that is stated lies at 0.71, whatever the noise's size; those with it
lay at 0.99 to 1.02 (18 each of noise, stochastic rounding, and both kinds of privacy).
"""
_EVEN = 0.9
"""Least over largest distance between draws from which a shuffle's are told from noise beside."""
_OTHERS = 19
"""Batches of other photos: by chance one in twenty batches is nearest among as many and itself."""
_LOOKED = 3
"""Of these: how many show whether the distance alone tells batches apart."""
_BETWEEN = 0.75
"""Where the received update may lie on the way from other photos (0) to those stated (1), on
average: updates that have nothing to do with either lie at one half."""


def disagreement(
    victim: Victim, stack: Sequence[Defense], update: Update, view: View, labels: Tensor | None
) -> str:
    """Return why an update is not what stated weights, images and stack make; "" where it may be.

    The victim makes its own update of the images a few times, with other draws of the stack. The
    received one must be about as far from these as they are from each other, and no nearer: then
    stated noise is not there. Where that would be so of other photos as well, as under strong
    noise, it must be nearer to what the stated images make than to what 19 batches of other photos
    do, in the directions in which plain updates of both differ. Other images pass that by chance
    once in twenty times; where noise covers all, the right ones do no better.

    Args:
        victim: With the stated images. Its own labels are tried where none are given and the
            update tells none.
        view: What the adversary sees of the update.
    """
    received = _readable(update)
    tried = [labels] if labels is not None else _labels(victim, view)
    try:
        chosen = _likeliest(victim, received, tried)
        again = [_made(victim, stack, chosen, i) for i in range(_DRAWS)]
    except VitguardError as error:
        return f"the stated images and stack make no update ({error})"
    between = [_distance(a, b) for a, b in itertools.combinations(again, 2)]
    apart, least = max(between), min(between)
    gap = min(_distance(received, one) for one in again)
    length = max(_length(one) for one in again)
    reach = _SPREAD * apart + _NEAR * length
    if gap > reach:
        return (
            "the update is not what the stated weights, images and stack make: it is "
            f"{gap / max(length, _LEAST):.0%} of its length away. Check the checkpoint, the "
            "images, mean and deviation"
        )
    drawn = view.traits.shuffle is None or least > _EVEN * apart  # few shuffles may repeat
    if drawn and gap < _NEARER * least and least > _ROUNDING * length:
        return (
            "the update is not what the stated stack makes: it is nearer to what the images make "
            "than draws of the stack are to each other, so that noise which is stated is not "
            "there. Check the stack and how the update was made"
        )
    return _untold(replace(victim, labels=chosen), stack, received, again, reach)


def _untold(
    victim: Victim,
    stack: Sequence[Defense],
    received: Tensors,
    made: Sequence[Tensors],
    reach: float,
) -> str:
    """Return that an update tells nothing of its images; "" where it is of those stated.

    Args:
        victim: With the stated images and labels.
        made: What these make under the stack, with several draws.
        reach: How far an update may be from these.
    """
    others = [replace(victim, pixels=pixels) for pixels in _other_photos(victim)]
    looked = [_made_or_none(other, stack, victim.labels) for other in others[:_LOOKED]]
    if all(u is not None and _distance(u, m) > reach for u in looked for m in made):
        return ""  # the distance tells them apart
    usual, weights, plain = _mean(made), _precisions(made), _made(victim, (), victim.labels, 0)
    along = []
    for other in others:  # one at a time: updates are large
        if (update := _made_or_none(other, stack, victim.labels)) is None:
            continue
        toward = _minus(plain, _made(other, (), victim.labels, 0))
        whole = _product(_minus(usual, update), toward, weights)
        part = _product(_minus(received, update), toward, weights)
        along.append(part / whole if whole > 0 else -math.inf)
    if along and min(along) > 0.5 and sum(along) / len(along) > _BETWEEN:
        return ""
    return (
        "the update is no nearer to what the stated images make than to what other photos do: "
        "nothing in it shows whose it is. Its noise may cover that; else check images, labels"
    )


def _made_or_none(victim: Victim, stack: Sequence[Defense], labels: Tensor) -> Tensors | None:
    """Return an update, None where the stack refuses such images."""
    try:
        return _made(victim, stack, labels, 0)
    except VitguardError:
        return None


def _other_photos(victim: Victim) -> list[Tensor]:
    """Return batches of photos, each like the stated one."""
    size = victim.size
    pool = decoys_for(victim.pixels, victim.seed, max(min(size * _OTHERS, DECOYS), size))
    step = size if size * _OTHERS <= len(pool) else len(pool) // _OTHERS + 1
    turned = (torch.roll(pool, -i * step, 0)[:size] for i in range(_OTHERS))
    return [enlarged(batch, victim.pixels).to(victim.pixels) for batch in turned]


def _mean(updates: Sequence[Tensors]) -> Tensors:
    return {n: torch.stack([u[n] for u in updates]).mean(0) for n in updates[0]}


def _minus(one: Tensors, other: Tensors) -> Tensors:
    return {n: t - other[n] for n, t in one.items() if n in other}


def _precisions(made: Sequence[Tensors]) -> dict[str, float]:
    """Return for each tensor how much its entries tell: less where draws of the stack differ."""
    weights = {}
    for name in made[0]:
        each = torch.stack([u[name] for u in made])
        spread = float(each.var(0).mean()) + (_NEAR**2) * float(each.square().mean())
        weights[name] = 1 / spread if spread > 0 else 0.0
    return weights


def _product(one: Tensors, other: Tensors, weights: Mapping[str, float]) -> float:
    return sum(
        weights[n] * float((t * other[n]).sum())
        for n, t in one.items()
        if n in other and n in weights
    )


def _labels(victim: Victim, view: View) -> list[Tensor]:
    """Return the labels that an update tells; else each class of one image, or the victim's own."""
    with seeded(victim.seed, victim.model):
        told = try_labels(view, torch.Generator().manual_seed(victim.seed))
    told = told if told is not None and len(told) == victim.size else None
    classes = Anatomy.of(victim.model).classes or 0
    if victim.size == 1 and classes <= _CLASSES and (told is None or not view.traits.exact):
        return [torch.tensor([c]) for c in range(classes)] or [victim.labels]
    if told is None:
        return [victim.labels]
    with seeded(victim.seed, victim.model):
        return [pair_labels(view, victim.pixels, told).cpu()]


def _likeliest(victim: Victim, received: Tensors, tried: Sequence[Tensor]) -> Tensor:
    """Return the labels whose plain update points most nearly where the received one does."""
    if len(tried) == 1:
        return tried[0]
    weights = {n: t.numel() / max(float(t.square().sum()), _LEAST) for n, t in received.items()}

    def cosine(labels: Tensor) -> float:
        plain = _made(victim, (), labels, 0)
        return (
            _product(received, plain, weights) / max(_product(plain, plain, weights), _LEAST) ** 0.5
        )

    return max(tried, key=cosine)


def _made(victim: Victim, stack: Sequence[Defense], labels: Tensor, draw: int) -> Tensors:
    of_it = replace(victim, labels=labels, seed=victim.seed + 1 + draw)
    return _readable(of_it.made(stack)[1])


def _readable(update: Update) -> Tensors:
    return {n: t.double().cpu() for n, t in update.tensors.items() if not n.startswith("vitguard.")}


def _distance(one: Tensors, other: Tensors) -> float:
    """Return the 2-norm of the difference of what both hold."""
    return _length(_minus(one, other))


def _length(tensors: Tensors) -> float:
    return sum(float(t.square().sum()) for t in tensors.values()) ** 0.5
