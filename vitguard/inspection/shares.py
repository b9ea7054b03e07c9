"""How much single tokens and samples dominate the gradient of a layer, from its two factors.

The gradient of a linear layer is the sum over tokens of (gradient at its output) x (its input):
row k gets |g_tk| * ||a_t|| from token t, whatever the other tokens do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitguard.inspection.rows import SKETCH, nearest

__all__ = ["Shares", "gram_of_samples", "separation", "token_shares"]

_ROUNDING = 1e-5
"""Of a row's length: a difference below it is rounding."""


@dataclass(frozen=True)
class Shares:
    """Shares of the strongest patch token, in [0, 1], by row of a layer; rows without gradient out.

    Args:
        rows: In the gradient of a row; of many rows `SAMPLE` are drawn.
        pairs: In the difference of such a row and the one whose gradient is nearest to it, each
            scaled to the same length: what a craft with bins reads single tokens from.
    """

    rows: Tensor
    pairs: Tensor


def token_shares(
    inputs: Tensor, outputs: Tensor, prefix: int, generator: torch.Generator
) -> Shares:
    """Return how much the strongest patch token of a layer gives to each row of its gradient.

    Args:
        inputs: Of the layer, shape (batch, tokens, columns).
        outputs: Gradient at its output, shape (batch, tokens, rows).
        prefix: Leading tokens that are no patches; they count in the sums alone.
        generator: Draws the rows, and the projection in which the nearest ones are looked for.
    """
    patch = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    patch[:, :prefix] = False
    patch = patch.reshape(-1)
    sizes = inputs.float().norm(dim=2).reshape(-1)  # of each token
    outputs = outputs.float().flatten(0, 1)
    short = _sketch(outputs, sizes, generator).T
    lengths = short.norm(dim=1)
    live = (lengths > 1e-6 * lengths.median()).nonzero()[:, 0]
    if len(live) < 2:
        return Shares(outputs.new_zeros(0), outputs.new_zeros(0))
    drawn, other = nearest(short[live], generator)
    both = outputs.index_select(1, live[torch.cat([drawn, other])]).mul_(sizes[:, None])
    both.div_(_lengths(both).clamp_min(1e-12))  # of each row its tokens, scaled to length 1
    one, two = both.tensor_split(2, dim=1)
    two.mul_((one * two).sum(0).sign())
    two.sub_(one)  # now the difference
    kept = _lengths(two) > _ROUNDING
    return Shares(_strongest(one, patch), _strongest(two, patch)[kept])


def _sketch(outputs: Tensor, sizes: Tensor, generator: torch.Generator) -> Tensor:
    """Return the rows' gradients by token, added up with random signs where tokens are many.

    Every `SKETCH`-th token goes into one sum, so that the tokens of one image lie in all of them.
    """
    count = len(sizes)
    if count <= SKETCH:
        return sizes[:, None] * outputs
    signs = torch.randint(0, 2, (count,), generator=generator).to(outputs) * 2 - 1
    signed = (signs * sizes)[:, None] * outputs
    whole = count // SKETCH * SKETCH
    sums = signed[:whole].view(-1, SKETCH, outputs.shape[1]).sum(0)
    sums[: count - whole] += signed[whole:]
    return sums


def _lengths(columns: Tensor) -> Tensor:
    return (
        columns.square().sum(0).sqrt()
    )  # `norm` over the first dimension takes four times as long


def _strongest(columns: Tensor, patches: Tensor) -> Tensor:
    """Return the share of the largest patch in each column; `columns` is not needed after."""
    sizes = columns.abs_()
    whole = sizes.sum(0).clamp_min(1e-30)
    return sizes.mul_(patches[:, None]).amax(0) / whole


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
