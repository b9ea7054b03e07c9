"""ATS: transformations that were searched for, applied to every image before training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from recipes import Judged
from vitguard.attacks.base import Attack
from vitguard.attacks.position import PositionInversion
from vitguard.core import Batch, Guess, View
from vitguard.defenses.base import BatchDefense, Draws
from vitguard.errors import expected
from vitguard.vit import Anatomy

_ACROSS, _DOWN, _CONTRAST = 150 / 331, 150 / 331 * 2 / 9, 0.5 * 6 / 9
"""Sizes of the operations 3 (translate across), 7 (down) and 1 (contrast) of the authors' list."""
_FLAT = 1e-4  # standard deviation of a border that was filled, in model-input units
_PROVED = 1e-4  # residual of the equations at which patches are right


@dataclass(frozen=True)
class Transformed(BatchDefense):
    """Translate across, change the contrast, translate down; each sign a secret draw.

    Guarantees:
        None, but that what leaves the frame is in no update.

    Args:
        strength: Factor on all three sizes, in [0, 1]; 1 as published.
    """

    name: ClassVar[str] = "ats"
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise expected("strength in [0, 1]", self.strength)

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Return the batch transformed; the frame is filled with the mean colour, 0."""
        signs = 2 * draws.chosen(3 * len(batch.images), 0.5).reshape(-1, 3).astype(int) - 1
        made = [
            self._one(image, *map(int, s)) for image, s in zip(batch.images, signs, strict=True)
        ]
        return replace(batch, images=torch.stack(made))

    def _one(self, image: Tensor, across: int, contrast: int, down: int) -> Tensor:
        height, width = image.shape[-2:]
        moved = shifted(image, across * round(self.strength * _ACROSS * width), 2)
        mean = moved.mean((1, 2), keepdim=True)
        moved = mean + (1 + contrast * self.strength * _CONTRAST) * (moved - mean)
        return shifted(moved, down * round(self.strength * _DOWN * height), 1)


def shifted(image: Tensor, by: int, axis: int) -> Tensor:
    """Return the image moved along an axis; what is uncovered is 0."""
    moved, size = image.roll(by, axis), image.shape[axis]
    gone = range(by) if by >= 0 else range(size + by, size)
    return moved.index_fill(axis, torch.tensor(list(gone), dtype=torch.long), 0.0)


@dataclass(frozen=True)
class Undone(Attack):
    """Read the transformed image with `position`, find the signs from its flat border, undo them.

    Args:
        strength: As the defense's, which is public.
    """

    name: ClassVar[str] = "position-undone"
    family: ClassVar[str] = "closed-form"
    strength: float = 1.0

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return the image at its place, `verified` where it was in the frame."""
        found = PositionInversion().run(view, generator)
        image = view.normalization.apply(found.images[0].double())
        height, width = image.shape[-2:]
        by = round(self.strength * _ACROSS * width), round(self.strength * _DOWN * height)
        down, across = _flat_end(image, by[1], 1), 0
        inside = image[:, max(down, 0) : height + min(down, 0)]
        across = _flat_end(inside, by[0], 2)
        if not (down and across):
            return found  # it was not transformed
        border = inside[:, :, :across] if across > 0 else inside[:, :, across:]
        # the border was 0 before the contrast f: it is m (1 - f), and m was the mean of all
        border, seen = border.mean((1, 2))[:, None, None], inside.mean((1, 2), keepdim=True)
        factors = [1 + sign * self.strength * _CONTRAST for sign in (-1, 1)]
        factor = min(factors, key=lambda f: float((border / (1 - f) - seen).abs().sum()))
        mean = border / (1 - factor)
        image = mean + (image - mean) / factor
        image = _continued(image.roll((-down, -across), (1, 2)), -down, 1)
        image = _continued(image, -across, 2)
        inverted = view.normalization.invert(image)[None].clamp(0, 1)
        kept = shifted(shifted(torch.ones_like(image), -down, 1), -across, 2)
        proved = float(found.details["residual"]) < _PROVED  # type: ignore[arg-type]
        whole = Anatomy.of(view.model).patchify(kept[None]).bool().all(-1) & proved
        return replace(found, images=inverted, verified=whole)


def _flat_end(image: Tensor, by: int, axis: int) -> int:
    """Return by how much an image was moved along an axis: `by`, `-by`, or 0 for no flat end."""
    for moved in (by, -by) if by else ():
        at = 0 if moved > 0 else image.shape[axis] - by
        if float(image.narrow(axis, at, by).std((1, 2)).max()) < _FLAT:
            return moved
    return 0


def _continued(image: Tensor, by: int, axis: int) -> Tensor:
    """Fill what a translation by `by` lost with the nearest line that is known."""
    if not by:
        return image
    size = image.shape[axis]
    lost = range(by) if by > 0 else range(size + by, size)
    known = image.narrow(axis, by if by > 0 else size + by - 1, 1)
    shape = list(image.shape)
    shape[axis] = abs(by)
    return image.index_copy(axis, torch.tensor(list(lost)), known.expand(shape))


JUDGED = Judged(
    title="Automatic transformation search (ATS)",
    place="images",
    source="Gao et al., arXiv:2011.12505",
    claim="Images preprocessed by searched transformations make it infeasible to extract anything "
    "useful from gradients, at little cost in accuracy.",
    rebuilt="The published policy 3-1-7: translation by 45 % of the width, contrast by a third, "
    "translation by 10 % of the height, each with a random sign; sizes as in the authors' code, "
    "filled with the mean colour.",
    threat="The policy is public, the signs are secret draws.",
    stack=(Transformed(),),
    attack=Undone(),
    found="What the model was shown comes back exactly, and translation and contrast are undone by "
    "their flat border. What left the frame is in no update: the same image moved the other way "
    "in a later round shows it.",
)
