"""Which positions were shuffled, where the update itself tells."""

from __future__ import annotations

import torch
from torch import Tensor

from vitguard.attacks.span.attack import SpanInversion
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable
from vitguard.vit import Anatomy

__all__ = ["leaked_mask"]

_RESIDUAL = 1e-2
"""Median residual of span inversion up to which its mask is believed."""


def leaked_mask(
    view: View, anatomy: Anatomy, start: Guess | None, generator: torch.Generator
) -> tuple[Tensor | None, str]:
    """Return shuffled positions, (batch, patches), and where they were read; None: not known.

    The mask of one draw shows in an update as rows of zeros in the gradient of learnable positions,
    or with fixed ones as the residual of span inversion. An earlier guess may bring its own. Masks
    of several images that differ, or of several local steps, cannot be told apart.
    """
    shuffle = view.traits.shuffle
    batch = view.update.batch_size
    if shuffle is None:
        return None, ""
    if view.update.local_steps > 1:
        return None, "drawn anew at each step: each local step had its own"
    given = start.shuffled if start is not None else None
    if given is not None and (len(given) == batch or (len(given) == 1 and shuffle.per_batch)):
        return given.expand(batch, -1), "from the start"
    if batch > 1 and not shuffle.per_batch:
        return None, "drawn anew at each step: each image had its own"
    mask = _zero_rows(view, anatomy)
    if mask is not None:
        return mask.expand(batch, -1), "rows of zeros in the position gradient"
    mask = _residual(view, generator) if batch == 1 else None
    if mask is not None:
        return mask, "residual of span inversion"
    return None, "drawn anew at each step: the update does not show it"


def _zero_rows(view: View, anatomy: Anatomy) -> Tensor | None:
    if anatomy.positions is None or view.traits.sparse:
        return None
    try:
        gradient = view.gradient().read(anatomy.positions)
    except (Blocked, NotApplicable):
        return None
    mask = (gradient == 0).all(-1).reshape(-1)[anatomy.position_prefix :]
    # Noise hides the zeros; without any, none of them means that nothing was shuffled.
    shown = bool(mask.any()) or view.traits.exact
    return mask[None].cpu() if shown else None


def _residual(view: View, generator: torch.Generator) -> Tensor | None:
    try:
        guess = SpanInversion().run(view, generator)
    except (Blocked, NotApplicable):
        return None
    clear = float(guess.details["residual"]) <= _RESIDUAL
    return guess.shuffled.cpu() if clear and guess.shuffled is not None else None
