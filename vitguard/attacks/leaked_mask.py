"""Which positions were shuffled, where the update itself tells."""

from __future__ import annotations

import torch
from torch import Tensor

from vitguard.attacks.span.attack import SpanInversion
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable
from vitguard.vit import Anatomy

__all__ = ["leaked_mask", "likely_mask"]

_RESIDUAL = 1e-2
"""Median residual of span inversion up to which its mask is believed."""
_FAINT = 1.5
"""How much stronger the next row of the position gradient is than those called shuffled."""


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
    mask = _faint_rows(view, anatomy)
    if mask is not None:
        return mask.expand(batch, -1), "the faintest rows of the position gradient"
    mask = _residual(view, generator) if batch == 1 else None
    if mask is not None:
        return mask, "residual of span inversion"
    return None, "drawn anew at each step: the update does not show it"


def likely_mask(view: View, anatomy: Anatomy, generator: torch.Generator) -> tuple[Tensor, str]:
    """Return the positions of one image that were shuffled most likely, and where they were read.

    As `leaked_mask`; where nothing is sure, those that look most like it. A caller that fits an
    image to the update sees by the misfit whether it was right.

    Raises:
        NotApplicable: The update does not show any.
    """
    if view.update.batch_size > 1 or view.update.local_steps > 1:
        mask, why = leaked_mask(view, anatomy, None, generator)
    else:
        mask, why = _zero_rows(view, anatomy), "rows of zeros in the position gradient"
        if mask is None:
            mask, why = _faint_rows(view, anatomy, sure=False), "the faintest rows"
        if mask is None:
            mask, why = _residual(view, generator, sure=False), "the largest residuals of span"
    if mask is None:
        raise NotApplicable(f"which positions were shuffled is not known ({why})")
    return mask, why


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


def _faint_rows(view: View, anatomy: Anatomy, *, sure: bool = True) -> Tensor | None:
    """Return the rows of the position gradient in which there is noise and nothing else."""
    shuffle = view.traits.shuffle
    if anatomy.positions is None or shuffle is None or not 0 < shuffle.most < anatomy.patches:
        return None
    try:
        gradient = view.gradient().read(anatomy.positions)
    except (Blocked, NotApplicable):
        return None
    power = gradient.square().sum(-1).reshape(-1)[anatomy.position_prefix :]
    order = power.argsort()
    steps = power[order][1:] / power[order][:-1].clamp_min(1e-300)  # from each row to the next
    count = shuffle.most if shuffle.exactly else int(steps[: shuffle.most].argmax()) + 1
    if not bool(steps[count - 1] > _FAINT):
        if sure:
            return None
        count = shuffle.most
    mask = torch.zeros_like(power, dtype=torch.bool)
    mask[order[:count]] = True
    return mask[None].cpu()


def _residual(view: View, generator: torch.Generator, *, sure: bool = True) -> Tensor | None:
    try:
        guess = SpanInversion().run(view, generator)
    except (Blocked, NotApplicable):
        return None
    mask, shuffle = guess.shuffled, view.traits.shuffle
    if mask is None or shuffle is None:
        return None
    if sure:
        return mask.cpu() if float(guess.details["residual"]) <= _RESIDUAL else None
    return mask.cpu() if 0 < int(mask.sum()) <= shuffle.most else None
