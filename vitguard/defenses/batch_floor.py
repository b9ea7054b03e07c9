"""Batch floor: no update leaves whose tokens are few beside the width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitguard.core import Update
from vitguard.defenses.base import Defense, Draws, UpdateDefense
from vitguard.errors import Incompatible, UpdateRefused, expected
from vitguard.vit import Anatomy, drops_patches

__all__ = ["BatchFloor"]


@dataclass(frozen=True)
class BatchFloor(UpdateDefense):
    """Refuse an update whose images have too few tokens together for the width of the model.

    The exact attacks solve D - T equations of a norm that is D wide, for the T tokens of a batch:
    with T >= D none is left. An update of too few images raises; add up gradients over as many as
    `least_batch` says, and state that number as the update's `batch_size`.

    Guarantees:
        No update leaves that shows a tensor of the embedding or of a block, and whose images have
        fewer tokens together than `multiple` times the width.
        Where the images are at hand (`Guard.update`), those that repeat another count once.

    Does not protect against:
        A server that writes the weights: class fishing leaves the gradient of one image in the
        blocks, however many there are, and `sample-normalisation` does not change that.
        One image whose gradient outweighs those of its batch: it comes back as if it were alone
        (add `sample-normalisation`). The last block under a class token, which passes one token of
        each image: labels and features of that token (`cascade`) take as many images as the width.
        A client that states a wrong number of images: to `Guard.seal` without a batch repeats count
        as new images, and so do copies that differ in one pixel (augmented ones); images smaller
        than the model's count whole there. Several local steps on the same images. Attacks that
        count nothing.

    Args:
        multiple: Tokens over width, at least 1: below, equations are left.

    References:
        docs/methods.md 4.5.

    Examples:
        >>> from vitguard.models import build_model
        >>> from vitguard.vit import Anatomy
        >>> BatchFloor().least_batch(Anatomy.of(build_model("vit_base_patch16_224:depth=1")))
        16
    """

    name: ClassVar[str] = "batch-floor"
    multiple: float = 4.0

    def __post_init__(self) -> None:
        if not 1 <= self.multiple < math.inf:
            raise expected("a finite multiple of at least 1", self.multiple)

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Raise Incompatible where tokens are no one count: several widths, dropped patches."""
        sizes = {n: p.shape for n, p in model.named_parameters()}
        layers = (f"{block.fc1}.weight" for block in anatomy.blocks)
        widths = {sizes[n][-1] for n in layers if n in sizes}
        if drops_patches(model):
            raise Incompatible(
                f"Expected a model that keeps all patches for {self.name}, got one that drops some "
                "in training: an image has fewer tokens than it counts. Build it without patch "
                "dropout, or leave this defense out."
            )
        if len(widths) > 1 or not anatomy.blocks:
            raise Incompatible(
                f"Expected blocks of one width for {self.name}, got widths {sorted(widths)}: its "
                "count is of a plain Vision Transformer. Leave it out."
            )

    def least_batch(self, anatomy: Anatomy) -> int:
        """Return the images whose tokens reach the floor."""
        return max(1, math.ceil(self.multiple * anatomy.width / anatomy.tokens))

    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return the update as it is.

        Raises:
            UpdateRefused: It has too few images.
        """
        self._require(update, update.batch_size, anatomy)
        return update

    def look(self, update: Update, images: Tensor, anatomy: Anatomy) -> None:
        """Raise UpdateRefused where repeats of few images, or small ones, reach the floor."""
        different = len({_bytes(image) for image in images})
        counted, got = update.batch_size - len(images) + different, ""
        if different < len(images):
            got = f"{different} different (others repeat these)"
        high, wide = (n // p for n, p in zip(images.shape[-2:], anatomy.patch_size, strict=True))
        tokens = high * wide + anatomy.prefix_tokens
        if tokens < anatomy.tokens:  # a model that takes other sizes
            got = f"{got or counted} of {tokens} tokens each"
            counted = counted * tokens // anatomy.tokens
        if got:
            self._require(update, counted, anatomy, got)

    def _require(self, update: Update, images: int, anatomy: Anatomy, got: str = "") -> None:
        least = self.least_batch(anatomy)
        shown = next((n for n in update.tensors if _counts(n, anatomy)), None)
        if shown is not None and images < least:
            raise UpdateRefused(
                f"Expected at least {least} images behind an update ({anatomy.tokens} tokens each, "
                f"{self.multiple:g} times the width {anatomy.width}), got {got or images}; "
                "nothing was released. Take larger batches, or add up the gradients of several "
                "and state their images together as batch_size."
            )


def _bytes(image: Tensor) -> bytes:
    values = image.detach().cpu().contiguous().reshape(-1) + 0.0  # the two zeros are one value
    return bytes(values.view(torch.uint8).numpy())


def _counts(name: str, anatomy: Anatomy) -> bool:
    """Whether a tensor's gradient has rows of many tokens."""
    inside = tuple(f"{block.name}." for block in (*anatomy.blocks, *anatomy.readers))
    return name.startswith(inside) or anatomy.role(name) in ("patch", "position", "token")
