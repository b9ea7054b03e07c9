"""Sample normalisation: no example's gradient outweighs another's. No noise, no epsilon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vitguard.core import Batch, Loss, Traits
from vitguard.defenses.base import Defense, Draws, StepDefense
from vitguard.defenses.privacy.checks import check_model
from vitguard.defenses.privacy.defense import DifferentialPrivacy
from vitguard.defenses.privacy.mixing import refuse_mixing_defenses
from vitguard.errors import UpdateRefused, expected
from vitguard.vit import Anatomy

__all__ = ["SampleNormalisation"]

_SHORT = 1e-10
"""A clip that every gradient exceeds: all are cut to it, and so made as large as each other.

One that does not is refused.
"""


@dataclass(frozen=True)
class SampleNormalisation(StepDefense):
    """Give each example's gradient the same 2-norm, or at most that, before they are averaged.

    The machinery of differential privacy without its noise: the average has no epsilon. It takes
    away what makes a large batch leak, one image whose gradient outweighs the others'.

    Guarantees:
        Each example adds a vector of 2-norm `size / batch` (`clip`: at most that) to the gradient,
        over all parameters together, whatever the others are. A batch in which a gradient is too
        small (an image that the model has fitted) or not finite is refused; `clip` takes it.

    Does not protect against:
        Exact attacks on few images, of which a factor changes nothing: at one image `position` and
        `span` are as exact as before. It goes with `batch-floor`. An image that looks unlike its
        batch still stands out; only noise hides that one took part. `clip` among fitted images,
        whose gradients stay nearly zero: one with a wrong label outweighs them. A server that
        writes the weights: the size is one of all parameters together, so class fishing keeps the
        others' gradients in the head, and one image is left in the blocks, whatever the floor.

    It acts in `Guard.update`. A training loop of one's own takes `privacy:noise=0,clip=SIZE`, which
    clips in the same way and says that it has no epsilon.

    Args:
        size: 2-norm of an example's gradient over all parameters, above 0.
        mode: `normalise` makes every gradient as large; `clip` shortens larger ones alone.

    References:
        Bu et al., arXiv:2206.07136 (automatic clipping); docs/methods.md 4.5.
    """

    name: ClassVar[str] = "sample-normalisation"
    size: float = 1.0
    mode: Literal["normalise", "clip"] = "normalise"

    def __post_init__(self) -> None:
        if not 0 < self.size < math.inf:
            raise expected("a finite size above 0", self.size)
        if self.mode not in ("normalise", "clip"):
            raise expected("mode normalise or clip", repr(self.mode))

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Raise Incompatible if no gradient of one example alone can be told for the model."""
        check_model(model)
        refuse_mixing_defenses(stack, anatomy)

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return that the gradient is not the mean of the examples': each has a weight."""
        return replace(before, exact=False)

    def gradient(
        self, model: nn.Module, loss: Loss, batch: Batch, draws: Draws
    ) -> Mapping[str, Tensor]:
        """Return the mean of the normalised gradients, by base parameter name.

        Raises:
            UpdateRefused: An example's gradient has no size to bring to that of the others.
        """
        clip = self.size if self.mode == "clip" else _SHORT
        made = DifferentialPrivacy(noise=0.0, clip=clip).clipped(model, loss, batch)
        if self.mode == "normalise":
            _require_sizes(made.norms)
        return {k: s * (self.size / clip / len(batch.labels)) for k, s in made.sums.items()}

    def mimic(self, examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Normalise each example's gradient as the engine does."""
        least = _SHORT if self.mode == "normalise" else self.size
        made = []
        for gradient in examples:
            squares = torch.stack([g.square().sum() for g in gradient.values()]).sum()
            factor = self.size / squares.clamp_min(least**2).sqrt()
            made.append({k: g * factor for k, g in gradient.items()})
        return super().mimic(made)


def _require_sizes(norms: Tensor) -> None:
    """Refuse a batch in which one gradient would stay shorter than the others."""
    bad = (~((norms > _SHORT) & norms.isfinite())).nonzero().flatten().tolist()
    if bad:
        which = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise UpdateRefused(
            f"Expected gradients that can be made one size, got {len(bad)} of {len(norms)} that "
            f"are below {_SHORT:g} (fitted images) or not finite: images {which} of the batch, "
            "which no factor makes as large as the others. Nothing was released. Leave these "
            "images out, or take sample-normalisation:mode=clip, where one image may outweigh them."
        )
