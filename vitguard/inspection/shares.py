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
    """What the strongest patch token gives to each row of a layer; rows without gradient are out.

    Args:
        rows: Its share in the gradient of a row, in [0, 1]; of many rows `SAMPLE` are drawn.
        pairs: Whether it makes more than half of the difference of such a row and the one whose
            gradient is nearest to it, each scaled to the same length: what a craft with bins reads
            single tokens from.
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
    sizes = inputs.float().norm(dim=2)
    patches = sizes.clone()
    patches[:, :prefix] = 0
    sizes, patches = sizes.reshape(-1), patches.reshape(-1)
    outputs = outputs.float().flatten(0, 1)
    short = _sketch(outputs, sizes, generator).T
    lengths = short.norm(dim=1)
    live = (lengths > 1e-6 * lengths.median()).nonzero()[:, 0]
    if len(live) < 2:
        return Shares(outputs.new_zeros(0), live.new_zeros(0, dtype=torch.bool))
    pairs = live[torch.stack(nearest(short[live], generator))]
    both = outputs.index_select(1, pairs.view(-1))
    one = both[:, : pairs.shape[1]].abs()
    whole = (sizes @ one).clamp_min(1e-30)
    rows = one.mul_(patches[:, None]).amax(0) / whole
    short = short[pairs] / (sizes.square() @ both.square_()).sqrt().view(*pairs.shape, 1)
    # a difference that is rounding, and more than the sketch is wrong by
    least = 2 * _ROUNDING * len(sizes) ** 0.5
    maybe = _one_sum_rules(short, least).nonzero()[:, 0]
    ruled = torch.zeros_like(rows, dtype=torch.bool)
    if len(maybe):
        strongest, kept = _differences(outputs, sizes, patches, pairs[:, maybe])
        ruled[maybe] = strongest > 0.5
        ruled = ruled[torch.ones_like(ruled).index_put_((maybe,), kept)]
    return Shares(rows, ruled)


def _sketch(outputs: Tensor, sizes: Tensor, generator: torch.Generator) -> Tensor:
    """Return the rows' gradients by token, added up with random signs where tokens are many.

    Every `SKETCH`-th token goes into one sum, so that the tokens of one image lie in all of them.
    """
    count = len(sizes)
    if count <= SKETCH:
        return sizes[:, None] * outputs
    signs = torch.randint(0, 2, (count,), generator=generator).to(outputs) * 2 - 1
    signed = signs * sizes
    whole = count // SKETCH * SKETCH
    by_sum = outputs[:whole].view(-1, SKETCH, outputs.shape[1]).transpose(0, 1)
    sums = (signed[:whole].view(-1, SKETCH).T[:, None] @ by_sum)[:, 0]
    sums[: count - whole] += signed[whole:, None] * outputs[whole:]
    return sums


def _one_sum_rules(short: Tensor, least: float) -> Tensor:
    """Return for each pair whether one sum of the sketch may be more than all others together.

    Where one token is more than all others together, the sum that it lies in is as well: the others
    take away from it, and add to the other sums, no more than they have.

    Args:
        short: Sketches of the rows of each pair, of the same length; shape (2, pairs, sums).
        least: What sums may be wrong by.
    """
    one, two = short
    # the sign that brings the rows together is not known exactly; rows without a common token
    # have none
    sums = torch.stack([one - two, one + two, one]).abs_()
    largest = sums.amax(2)
    # also where a length is no number
    return (~(2 * largest <= sums.sum(2) - least)).any(0)


def _differences(
    outputs: Tensor, sizes: Tensor, patches: Tensor, pairs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the strongest patch's share in the differences of pairs of rows, and which are none.

    Args:
        patches: Sizes of the tokens, zero for those that are no patches.
        pairs: Indices of rows, shape (2, pairs).
    """
    both = outputs.index_select(1, pairs.reshape(-1)).mul_(sizes[:, None])
    both.div_(_lengths(both).clamp_min(1e-12))  # of each row its tokens, scaled to length 1
    one, two = both.tensor_split(2, dim=1)
    two.mul_((one * two).sum(0).sign())
    two.sub_(one)  # now the difference
    kept = _lengths(two) > _ROUNDING
    two.abs_()
    whole = two.sum(0).clamp_min(1e-30)
    return two.mul_((patches > 0)[:, None]).amax(0) / whole, kept


def _lengths(columns: Tensor) -> Tensor:
    return (
        columns.square().sum(0).sqrt()
    )  # `norm` over the first dimension takes four times as long


def gram_of_samples(inputs: Tensor | None, outputs: Tensor) -> Tensor:
    """Return the products of the samples' own gradients, (batch, batch), of a layer on one token.

    Args:
        inputs: Shape (batch, columns); None for a bias.
        outputs: Gradient at the output, shape (batch, rows).
    """
    outputs = outputs.double()
    gram = outputs @ outputs.T
    if inputs is None:
        return gram
    inputs = inputs.double()
    return gram.mul_(inputs @ inputs.T)


def separation(gram: Tensor) -> float:
    """Return SEER's D-SNR: the largest |g_i| / |sum of the other samples' gradients|.

    0 for a single sample, of which there is nothing to tell, and where no sample has a gradient.

    References: Garov et al. (arXiv:2306.03013), section 3.

    Args:
        gram: Products of the samples' gradients, shape (batch, batch).
    """
    own = gram.diagonal().clamp_min(0)
    largest = own.max().item() if len(own) > 1 else 0.0
    if not largest:
        return 0.0
    sums = gram.sum(1)
    others = sums.sum() - 2 * sums + own
    return (own / others.clamp_min(1e-18 * largest)).max().item() ** 0.5
