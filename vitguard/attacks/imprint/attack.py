"""Imprint reading: what a server that wrote the weights reads from the gradients of its bins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.equations.rows import Embedding, guess_from_patches
from vitguard.attacks.imprint.bank import Bank, Single, Tokens, banks_of, peeled
from vitguard.core import Guess, View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = ["ImprintReading"]

_WRONG = 0.01  # root mean square error, in pixels of [0, 1], that a verified patch has at most
_HIDDEN = 0.01  # share of a patch's directions that the token may lack
_EMPTY = 1e-3  # weight of a token that is none, relative to the largest in the update
_APART = 1e-3  # relative difference of two images' weights


@dataclass(frozen=True)
class ImprintReading(Attack):
    """Read single tokens from neighbouring rows of a malicious server's bins, then their patches.

    A row of fc1 sums the tokens above its threshold, so that neighbouring rows differ by the tokens
    between their thresholds. One token alone is told from a mixture by its length, which LayerNorm
    makes the same for all; a known token is taken out of its bins along other directions, where it
    may leave another one alone. The constant that the server added gives its scale back, the
    pseudo-inverse of the patch weight its patch. A sum of several clients is read like a batch.
    `verified` patches are right to 40 dB, up to the few directions for which the token has no room.

    Raises:
        NotApplicable: The server did not write such bins, or no token stands alone.
        Blocked: The gradient of fc1 cannot be read.

    References:
        arXiv 2110.13057, docs/methods.md 2.7.
    """

    name: ClassVar[str] = "imprint"
    family: ClassVar[str] = "closed-form"
    rung: ClassVar[Rung | None] = Rung(5, 5)

    def share(self, view: View) -> float:
        """Skip the rung where the weights are honest."""
        return float(view.crafted is not None and bool(view.crafted.bins))

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return as many images as are behind the update; patches that were not found are flat."""
        if view.crafted is None or not view.crafted.bins:
            raise NotApplicable("the server wrote no bins into the weights")
        anatomy = Anatomy.of(view.model)
        anatomy.require_plain_embedding()
        summed = view.gradient(steps=True)
        embedding = Embedding.of(view, anatomy)
        tokens = Tokens.of(embedding.weight, embedding.offset, _eps(view.model, anatomy))
        banks = banks_of(summed, anatomy, view.crafted.bins)
        size = sum(view.normalization.std) / len(view.normalization.std)
        allowed = _WRONG / size * anatomy.patch_pixels**0.5 / _gain(tokens)
        found = _found(banks, tokens, anatomy.patches, allowed)
        if not found:
            raise NotApplicable("no bin holds a single token")
        batch = view.update.batch_size
        patches, there = _images(found, tokens, batch, anatomy.patches)
        whole = anatomy.patch_pixels - tokens.rank <= _HIDDEN * anatomy.patch_pixels
        details = {"found": len(found), "tokens": batch * anatomy.patches}
        return guess_from_patches(
            view,
            anatomy,
            patches,
            verified=there if whole and view.traits.exact else torch.zeros_like(there),
            details=details,
        )


def _eps(model: nn.Module, anatomy: Anatomy) -> float:
    modules = dict(model.named_modules())
    return float(getattr(modules.get(anatomy.blocks[0].norm2), "eps", 0.0))


def _gain(tokens: Tokens) -> float:
    """Return the size of the largest patch that a token of size 1 makes, per its own size."""
    return float(torch.linalg.matrix_norm(tokens.back, 2))


def _found(banks: Sequence[Bank], tokens: Tokens, places: int, allowed: float) -> list[Single]:
    groups = len(banks[0].bins)
    least = _EMPTY * max(float(bank.bins[..., -1].abs().max()) for bank in banks)
    gated = groups == places and groups > 1
    return [
        single
        for group in range(groups)
        for single in peeled(banks, group, tokens, gated=gated, allowed=allowed, least=least)
    ]


def _images(
    found: Sequence[Single], tokens: Tokens, batch: int, places: int
) -> tuple[Float[Tensor, "batch patches pixels"], Bool[Tensor, "batch patches"]]:
    """Return the images that the patches make, and where a patch was found.

    All tokens of one image have the same weight up to their scale; another image with another
    label, or of another brightness, has another one.
    """
    seen = torch.stack([single.token for single in found])
    at = torch.tensor([single.place for single in found])
    patches = tokens.patches(seen, at)
    marks = tokens.scales(seen, at) * seen.new_tensor([single.weight for single in found])
    images = patches.new_zeros(batch, places, patches.shape[1])
    there = torch.zeros(batch, places, dtype=torch.bool)
    left = []
    for n, image in enumerate(_clusters(marks, batch)):
        if there[image, at[n]]:
            left.append(n)
        else:
            images[image, at[n]], there[image, at[n]] = patches[n], True
    for n in left:  # two images of one mark: put it where there is room
        free = (~there[:, at[n]]).nonzero()[:, 0]
        if len(free):
            images[free[0], at[n]], there[free[0], at[n]] = patches[n], True
    flat = images.sum(1) / there.sum(1, keepdim=True).clamp_min(1)
    return torch.where(there[..., None].to(images.device), images, flat[:, None]), there


def _clusters(marks: Float[Tensor, " found"], batch: int) -> list[int]:
    """Return the image of each mark: marks in order are cut at their widest gaps."""
    ordered, order = marks.sort()
    gaps = ordered.diff() / ordered.abs().max()
    widest = gaps.argsort(descending=True)[: batch - 1]
    cuts = set(widest[gaps[widest] > 1e-6].tolist())
    image, images = 0, [0] * len(marks)
    for k, n in enumerate(order.tolist()):
        images[n] = image
        image += k in cuts
    return images
