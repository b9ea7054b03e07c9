"""Tokens of which an update shows one of each image: the class token turned to one position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.equations.head import linear_head
from vitguard.attacks.imprint.bank import Single, Tokens
from vitguard.core import Bins, View
from vitguard.vit import Anatomy

__all__ = ["labelled", "of_head"]

_COUNTED = 1e-3  # distance of a number of images from a whole one
_ABOUT = 0.2  # the same, where gradients are not exact
_SAME = 1e-5  # relative difference of the weight of a token and the one that a label gives it


def labelled(
    found: Sequence[Single], rounds: Sequence[View], anatomy: Anatomy, tokens: Tokens
) -> tuple[list[Single], list[bool]]:
    """Return tokens with the label of their image as their mark, and whether they have one.

    The class token that turned to a patch is public up to that patch, and so is the head. So each
    label gives a token one weight, and what has none of these weights is no single token, or a part
    of one. Tokens of several rounds with the same label belong to the same image, where a batch has
    each label once.
    """
    known = {}
    for view in rounds:
        bins = view.crafted.bins[0] if view.crafted is not None else None
        if bins is not None and bins.places is not None:
            known[int(bins.places[0])] = _weights(found, view, anatomy, bins, tokens)
    marked, sure = [], []
    for n, single in enumerate(found):
        expected = known[single.place][n]
        label = int((expected - single.weight).abs().argmin())
        near = abs(float(expected[label]) - single.weight) <= _SAME * abs(single.weight)
        marked.append(replace(single, mark=float(1 + label), whole=near))
        sure.append(near)
    return marked, sure


def _weights(
    found: Sequence[Single], view: View, anatomy: Anatomy, bins: Bins, tokens: Tokens
) -> Float[Tensor, "found classes"]:
    """Return the weight of each token for each label of its image.

    The last norm divides the class token by its length, which LayerNorm made before: the head reads
    the token as it was found, and the gradient along the columns of fc2 comes back through both.
    """
    seen = torch.stack([single.token for single in found])
    out = view.weight(f"{bins.out}.weight")[:, int(bins.rows.flatten()[0])]
    before = seen.new_tensor([single.scale for single in found])
    size = tokens.again(before, _gain(view, anatomy)).sqrt()[:, None]
    head = linear_head(view)
    weight = view.weight(f"{head}.weight")[:, : seen.shape[1]]  # what is pooled first
    scores = (seen @ weight.T + view.bias(head)).softmax(-1)
    worth = weight @ (out / out.norm())
    return (scores @ worth[:, None] - worth) / size / view.update.batch_size


def _gain(view: View, anatomy: Anatomy) -> float:
    """Return the factor of what the last block's attention gives."""
    return float(view.weight(f"{anatomy.blocks[-1].proj}.weight")[0, 0])


def of_head(
    rounds: Sequence[View], anatomy: Anatomy, tokens: Tokens, allowed: float
) -> list[Single]:
    """Return the tokens of images whose label no other one has, as a head of zeros shows them.

    Every class is as likely: the gradient of row c is (S / C - the sum of its images) / batch, S
    the sum over all images. A class without an image shows S; its bias shows the size of the
    gradients, where a defense made them shorter, and the other biases count their images.
    """
    found = []
    for view in rounds:
        bins = view.crafted.bins[0] if view.crafted is not None else None
        if bins is None or bins.places is None:
            continue
        place = bins.places[:1]
        own = view.gradient(steps=True)
        bias = own.read(f"{bins.layer}.bias")
        rows = own.read(f"{bins.layer}.weight")[:, : tokens.still.shape[1]]
        batch, near = view.update.batch_size, _COUNTED if view.traits.exact else _ABOUT
        scale = len(bias) * bias.max()
        images = batch * (1 / len(bias) - bias / scale)
        if not bool((images - images.round()).abs().max() <= near):
            continue
        for label in (images.round() == 1).nonzero()[:, 0].tolist():
            token = batch * (rows[bias.argmax()] - rows[label]) / scale
            gain = _gain(view, anatomy)
            doubt = float(tokens.doubt(token[None], place, gain=gain)[0])
            if doubt <= allowed:
                size = float(tokens.scales(token[None], place)[0])
                found.append(Single(token, int(place), 1.0, doubt, True, size, float(1 + label)))
    return found
