"""How much single tokens and samples dominate the gradient of a layer, from its two factors.

The gradient of a linear layer is the sum over tokens of (gradient at its output) x (its input):
row k gets |g_tk| * ||a_t|| from token t, whatever the other tokens do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitguard.inspection.rows import nearest

__all__ = ["Shares", "gram_of_samples", "separation", "token_shares"]

_ROUNDING = 1e-5
"""Of a row's length: a difference below it is rounding."""


@dataclass(frozen=True)
class Shares:
    """Shares of the strongest patch token, in [0, 1], by row of a layer; rows without gradient out.

    Args:
        rows: In the gradient of a row.
        pairs: Of a sample of rows, in the difference of a row and the one whose gradient is nearest
            to it, each scaled to the same length: what a craft with bins reads single tokens from.
        left: Length of that difference, in [0, sqrt 2]: small where the rows cancel.
    """

    rows: Tensor
    pairs: Tensor
    left: Tensor


def token_shares(
    inputs: Tensor, outputs: Tensor, prefix: int, generator: torch.Generator
) -> Shares:
    """Return how much the strongest patch token of a layer gives to each row of its gradient.

    Args:
        inputs: Of the layer, shape (batch, tokens, columns).
        outputs: Gradient at its output, shape (batch, tokens, rows).
        prefix: Leading tokens that are no patches; they count in the sums alone.
    """
    weighted = outputs.float() * inputs.float().norm(dim=2, keepdim=True)
    mine = torch.zeros(weighted.shape[:2], dtype=torch.bool, device=weighted.device)
    mine[:, prefix:] = True
    mine = mine.reshape(-1)
    rows = weighted.flatten(0, 1).T.contiguous()  # of each row of the gradient its tokens
    lengths = rows.norm(dim=1)
    live = lengths > 1e-6 * lengths.median()
    if int(live.sum()) < 2:
        none = rows.new_zeros(0)
        return Shares(none, none, none)
    rows = rows[live] / lengths[live, None]
    drawn, other = nearest(rows, generator)
    one, two = rows[drawn], rows[other]
    difference = one - two * (one * two).sum(1, keepdim=True).sign()
    left = difference.norm(dim=1)
    kept = left > _ROUNDING
    return Shares(_strongest(rows, mine), _strongest(difference[kept], mine), left[kept])


def _strongest(rows: Tensor, patches: Tensor) -> Tensor:
    sizes = rows.abs()
    most = torch.where(patches, sizes, torch.zeros_like(sizes)).amax(1)
    return most / sizes.sum(1).clamp_min(1e-30)


def gram_of_samples(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the products of the samples' own gradients, (batch, batch), of a layer on one token.

    Args:
        inputs: Shape (batch, columns); ones for a bias.
        outputs: Gradient at the output, shape (batch, rows).
    """
    inputs, outputs = inputs.double(), outputs.double()
    return (inputs @ inputs.T) * (outputs @ outputs.T)


def separation(gram: Tensor) -> float:
    """Return SEER's D-SNR: the largest |g_i| / |sum of the other samples' gradients|.

    0 for a single sample, of which there is nothing to tell, and where no sample has a gradient.

    References: Garov et al. (arXiv:2306.03013), section 3.

    Args:
        gram: Products of the samples' gradients, shape (batch, batch).
    """
    own = gram.diagonal().clamp_min(0)
    if len(own) < 2 or not bool(own.any()):
        return 0.0
    others = gram.sum() - 2 * gram.sum(1) + own
    return float((own / others.clamp_min(1e-18 * own.max())).max().sqrt())
