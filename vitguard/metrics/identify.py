"""Identification: whether a guess is nearer to its truth than to every decoy."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitguard.errors import expected
from vitguard.metrics.checked import Decoys, Guesses, Images, Uninformed, checked, same_shape

__all__ = ["RIVALS", "identification", "identification_p"]

_SAME = 0.9  # correlation from which two images show the same
RIVALS = 199
"""Sets of guesses without information beside which a truth must stand out further."""


def identification(
    guess: Guesses, truth: Images, decoys: Decoys, uninformed: Uninformed | None = None
) -> Bool[Tensor, " batch"]:
    """Return whether each truth is more like the guesses than every decoy is.

    Similarity is the Pearson correlation after the mean of each channel is removed, so a constant
    guess identifies nothing. With several guesses the most similar one counts, for the truth and
    for each decoy alike: choosing the guess by the truth would lift noise above chance. Chance is
    1 / (decoys + 1) where truth and decoys have the same distribution.

    They seldom have: a mean image or smooth noise picks some truths out of decoys of another data
    set.
    With `uninformed`, a truth must also stand out further than it does to any of `RIVALS` sets of
    such guesses, as many in a set as there are guesses: chance is then at most 1 / (RIVALS + 1).

    Args:
        guess: Pixels in [0, 1], any number of guesses.
        truth: Pixels in [0, 1].
        decoys: Pixels in [0, 1]: other images. One that shows a truth (correlation above 0.9) does
            not stand beside it.
        uninformed: Images made without the truth; one that equals a decoy is not compared with it.
    """
    guess, truth = checked(guess, "guess"), checked(truth, "truth", strict=True)
    same_shape(guess, truth, "a guess")
    same_shape(decoys, truth, "decoys")
    found, rows = _standardized(guess), _standardized(truth)
    to_found, to_rows = _correlations(torch.cat([found, rows]), decoys).split(
        [len(found), len(rows)]
    )
    same = to_rows > _SAME
    margin = _margins(to_found[None], (found @ rows.T)[None], same)
    told = margin[0] > 1e-9
    if uninformed is None or not bool(told.any()):
        return told
    nulls = _standardized(checked(uninformed, "a guess without information", strict=True))
    to_decoys = _correlations(nulls, decoys)
    itself = to_decoys > _SAME
    to_decoys = torch.where(itself, to_decoys.masked_fill(itself, 0).mean(1, True), to_decoys)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(nulls), (RIVALS, len(guess)), generator=generator)
    drawn[:, 0] = torch.arange(RIVALS) % len(nulls)  # each of them has its turn
    to_truths = nulls @ rows.T
    lucky = torch.cat([_margins(to_decoys[d], to_truths[d], same) for d in drawn.split(16)])
    return told & (margin[0] > lucky.amax(0))


def _correlations(rows: Tensor, decoys: Decoys) -> Tensor:
    """Return the correlation of standardised rows with each decoy, shape (rows, decoys)."""
    # A few decoys at a time: a thousand large ones in float64 would be the audit's peak memory.
    few_at_once = max(1, 600_000 // decoys[0].numel())
    parts = decoys.split(few_at_once)
    every = [rows @ _standardized(checked(few, "decoys", strict=True)).T for few in parts]
    return torch.cat(every, dim=1)


def _margins(
    decoys: Float[Tensor, "sets guesses decoys"],
    truths: Float[Tensor, "sets guesses truths"],
    same: Bool[Tensor, "truths decoys"],
) -> Float[Tensor, "sets truths"]:
    """Return how much further each truth stands out, to any guess of a set, than any decoy."""
    margins = []
    for own, left_out in zip(truths.unbind(-1), same, strict=True):
        line_up = torch.cat([decoys[..., ~left_out], own[..., None]], dim=-1)
        # A clear guess is like everything natural, a noisy one like nothing: compare each on its
        # own scale. The scales of few decoys are chance themselves, hence the common part. Truth
        # and decoys enter alike: without information each is equally likely to come first.
        spread = line_up.std(-1, correction=0, keepdim=True)
        common = spread.square().mean(1, keepdim=True).sqrt()
        scale = (spread + common / (line_up.shape[-1] - 1) ** 0.5).clamp(min=1e-12)
        stands = ((line_up - line_up.mean(-1, keepdim=True)) / scale).amax(1)
        margins.append(stands[:, -1] - stands[:, :-1].amax(-1))
    return torch.stack(margins, dim=-1)


def identification_p(hits: int, trials: int, decoys: int) -> float:
    """Return the chance of `hits` or more identifications in `trials` by guessing.

    Each trial hits with probability 1 / (decoys + 1); binomial tail.
    """
    from scipy.special import bdtrc

    if not (0 <= hits <= trials and decoys >= 1):
        raise expected(
            "0 <= hits <= trials and a decoy or more", f"{hits} of {trials}, {decoys} decoys"
        )
    return float(bdtrc(hits - 1, trials, 1 / (decoys + 1))) if hits else 1.0


def _standardized(images: Tensor) -> Float[Tensor, "batch values"]:
    """Unit vectors with the mean of each channel removed; zero for a constant image."""
    centred = (images - images.mean((-2, -1), keepdim=True)).flatten(1)
    norm = centred.norm(dim=1, keepdim=True)
    constant = norm <= 1e-9 * centred.shape[1] ** 0.5
    return torch.where(constant, 0.0, centred / norm.clamp(min=1e-300))
