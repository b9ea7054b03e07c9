"""The gradients of bins as sums over tokens, and one group's bins taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.attacks.budget import charge

__all__ = ["NEAR", "Bank", "Single", "Tokens", "peeled"]

_ROUNDS = 64  # of peeling; photos take a handful
_LOOSER, _LOOSEST = 2.0, 100.0  # factors on the doubt that is allowed where gradients are inexact
NEAR = 8.0
"""Inputs of the activation within which a row is neither off nor wholly on."""


@dataclass(frozen=True, eq=False)
class Bank:
    """All bins of one position along one direction, by ascending threshold; float64.

    Args:
        bins: Difference of neighbouring rows: the weighted sum of the tokens after LayerNorm
            between two thresholds, and the sum of their weights; shape (bins, width + 1).
        rows, bias: What a row makes of a token after LayerNorm, shapes (bins, width) and (bins,):
            it counts the token where the result is above 0.
        place: The position; None where the bins hold tokens of all.
        longer: What earlier blocks added to the size of a token.
        added: What this one adds, before the size divides its weight; infinite where the weight
            is that of its image, whatever its size.
        gain: Of attention that gave the token before another LayerNorm; 0 where it is as embedded.
    """

    bins: Float[Tensor, "bins width_and_bias"]
    rows: Float[Tensor, "bins width"]
    bias: Float[Tensor, " bins"]
    place: int | None = None
    longer: float = 0.0
    added: float = 0.0
    gain: float = 0.0

    def inputs(self, token: Tensor, rows: slice = slice(None)) -> Float[Tensor, " n"]:
        """Return what the rows make of a token."""
        return self.rows[rows] @ token + self.bias[rows]

    def size(self, scale: float, eps: float) -> float:
        """Return what divides the weight of a token that LayerNorm divided by `scale`.

        Its own size is a little less than the scale, of which eps is a part.
        """
        if self.added == torch.inf:
            return 1.0
        if not self.added:
            return scale
        own = max(1 - eps / scale**2, 0.0) ** 0.5
        return own * (scale + self.added) + self.longer


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is public of tokens: how one after LayerNorm becomes a patch again; float64.

    Args:
        still: What the embedding adds to a patch at each position, mean removed, shape (positions,
            width).
        back: The pseudo-inverse of the patch weight, shape (pixels, width).
        beside: Orthonormal directions of the token that no patch reaches, shape (width, few).
        eps: Of LayerNorm, by which tokens are a little shorter than the root of the width.
        rank: Directions of a patch that its token keeps.
    """

    still: Float[Tensor, "positions width"]
    back: Float[Tensor, "pixels width"]
    beside: Float[Tensor, "width few"]
    eps: float
    rank: int

    @property
    def alike(self) -> bool:
        """Whether all positions are the same, so that no token tells its own."""
        return len(self.still) > 1 and bool((self.still == self.still[0]).all())

    @staticmethod
    def of(
        weight: Float[Tensor, "width pixels"], offset: Float[Tensor, "positions width"], eps: float
    ) -> Tokens:
        """Return the tokens of a patch weight and what is added to each position."""
        still = offset - offset.mean(1, keepdim=True)
        ones = torch.ones(len(weight), 1, dtype=weight.dtype, device=weight.device)
        charge(svd=2.0 * weight.numel() * min(weight.shape))
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        rank = int((sizes > 1e-5 * sizes[0]).sum())
        left = left[:, :rank]
        back = right[:rank].T @ (left / sizes[:rank]).T
        held = torch.cat([left, ones / len(weight) ** 0.5], 1)
        beside = torch.linalg.svd(held, full_matrices=True).U[:, rank + 1 :]
        return Tokens(still, back, beside, eps, rank)

    def places(self, tokens: Float[Tensor, "n width"]) -> Int[Tensor, " n"]:
        """Return the position at which each token holds the smallest patch.

        At a wrong position the difference of two positions is left as well.
        """
        seen, known = tokens @ self.beside, self.still @ self.beside
        scales = (seen @ known.T) / seen.square().sum(-1, keepdim=True).clamp_min(1e-300)
        charge(products=2.0 * tokens.numel() * len(known))
        left = scales.square() * tokens.square().sum(1, keepdim=True)
        left = left - 2 * scales * (tokens @ self.still.T) + self.still.square().sum(1)
        return left.argmin(1)

    def scales(self, tokens: Float[Tensor, "n width"], places: Tensor) -> Float[Tensor, " n"]:
        """Return the size by which LayerNorm divided each token at its position."""
        seen, known = tokens @ self.beside, self.still[places] @ self.beside
        return (seen * known).sum(-1) / seen.square().sum(-1).clamp_min(1e-300)

    def patches(self, tokens: Float[Tensor, "n width"], places: Tensor) -> Tensor:
        """Return the patches of tokens at their positions, (n, pixels), in model-input units."""
        scales = self.scales(tokens, places)[:, None]
        return (scales * tokens - self.still[places]) @ self.back.T

    def again(self, scales: Float[Tensor, " n"], gain: float) -> Float[Tensor, " n"]:
        """Return the square of what LayerNorm divides a token by that it divided before.

        Args:
            scales: By which it divided it first.
            gain: Factor between the two.
        """
        before = 1 - self.eps / scales.square().clamp_min(self.eps)
        return gain**2 * before + self.eps

    def doubt(
        self,
        tokens: Float[Tensor, "n width"],
        places: Tensor,
        longer: float = 0.0,
        gain: float = 0.0,
    ) -> Float[Tensor, " n"]:
        """Return a bound on how far each is from a single token, before LayerNorm.

        Tokens after LayerNorm have one length, and a mixture of two is shorter (longer, where
        their weights have opposite signs): what the square of its length lacks bounds how far it
        is from the nearer one. Where no patch reaches, a token is what its position adds; how far
        it is from that counts as well. Infinite for what has another length altogether: however
        small the size that undoes LayerNorm, it is no token.
        """
        scales = self.scales(tokens, places)
        square = (scales + longer).square().clamp_min(self.eps)
        if gain:
            square = self.again(scales, gain)
        length = tokens.shape[1] * (1 - self.eps / square)
        lacks = (tokens.square().sum(1) - length).abs()
        beside = scales[:, None] * (tokens @ self.beside) - self.still[places] @ self.beside
        doubt = (scales.square() * lacks + beside.square().sum(1)).sqrt()
        return doubt.masked_fill((lacks > 0.1 * length) | (scales <= 0), torch.inf)


@dataclass(frozen=True, eq=False)
class Single:
    """One token that stood alone in a bin.

    Args:
        token: After LayerNorm, shape (width,).
        place: Its position.
        weight: Its weight in the sums.
        doubt: As `Tokens.doubt`.
        whole: Whether it is clear of the thresholds, so that nothing of its weight is elsewhere.
        scale: By which LayerNorm divided it in the first block.
        mark: Its weight times its size: the same for all tokens of an image.
    """

    token: Tensor
    place: int
    weight: float
    doubt: float
    whole: bool
    scale: float
    mark: float


def peeled(
    banks: Sequence[Bank], tokens: Tokens, *, allowed: float, least: float, guessed: int = 0
) -> list[Single]:
    """Return the single tokens of a position; each is taken out of the bins of other directions.

    Args:
        banks: Of the same position.
        allowed: Doubt up to which a bin holds one token.
        least: Weight below which a bin is empty.
        guessed: Tokens up to which those of the least doubt are taken, however large it is.
    """
    open_ = [torch.ones_like(bank.bias, dtype=torch.bool) for bank in banks]
    found: list[Single] = []
    limit = allowed
    for _ in range(_ROUNDS):
        by_bank = [
            _singles(bank, at, tokens, limit, least) for bank, at in zip(banks, open_, strict=True)
        ]
        # of one direction at a time, where noise makes the same token two along two directions
        fresh = max(by_bank, key=len) if guessed else [s for one in by_bank for s in one]
        taken = 0
        for single in sorted(fresh, key=lambda one: (not one.whole, one.doubt)):
            if _known(single, found) or (limit > allowed and len(found) >= guessed):
                continue
            found.append(single)
            taken += 1
            for bank, at in zip(banks, open_, strict=True):
                _take_out(single, bank, at, tokens.eps)
        if not taken and len(found) < guessed and limit < _LOOSEST * allowed:
            limit *= _LOOSER
        elif not taken:
            break
    return found


def _singles(
    bank: Bank, open_: Tensor, tokens: Tokens, allowed: float, least: float
) -> list[Single]:
    """Return the tokens that are alone in a bin."""
    at = ((bank.bins[:, -1].abs() > least) & open_).nonzero()[:, 0]
    if not len(at):
        return []
    mean = bank.bins[at, :-1] / bank.bins[at, -1:]
    charge(elements=0.4 * mean.numel(), calls=12)
    places = tokens.places(mean) if bank.place is None else torch.full_like(at, bank.place)
    doubt = tokens.doubt(mean, places, bank.longer, bank.gain)
    scales = tokens.scales(mean, places)
    made = []
    for j in (doubt <= allowed).nonzero()[:, 0].tolist():
        around = bank.inputs(mean[j], slice(int(at[j]), int(at[j]) + 2))
        whole = bool((around.abs() >= NEAR).all())
        weight, far = float(bank.bins[at[j], -1]), float(doubt[j])
        scale = float(scales[j])
        mark = weight * bank.size(scale, tokens.eps)
        made.append(Single(mean[j], int(places[j]), weight, far, whole, scale, mark))
    return made


def _known(single: Single, found: Sequence[Single]) -> bool:
    """Whether it is the same token again: along another direction, in part, or taken out twice."""
    alike = [
        f.token
        for f in found
        if not single.whole or abs(abs(f.mark) - abs(single.mark)) < 1e-3 * abs(f.mark)
    ]
    if not alike:
        return False
    units = torch.nn.functional.normalize(torch.stack([*alike, single.token]))
    return bool(((units[:-1] - units[-1]).square().sum(1) < 1e-7).any())


def _take_out(single: Single, bank: Bank, open_: Tensor, eps: float) -> None:
    """Subtract a token from the bin that it lies in, or close the bins that hold a part of it."""
    charge(products=2.0 * bank.rows.numel(), calls=6)
    inputs = bank.inputs(single.token)
    near = (inputs.abs() < NEAR).nonzero()[:, 0].tolist()
    for n in near:
        open_[max(n - 1, 0) : n + 1] = False
    k = int((inputs > 0).sum()) - 1
    if k < 0 or near:
        return
    if not single.whole:
        open_[k] = False
        return
    weight, token = single.mark / bank.size(single.scale, eps), single.token
    if bank.longer or bank.added:  # LayerNorm makes a longer one a little longer too, by eps
        length = len(token) * (1 - eps / (single.scale + bank.longer) ** 2)
        token = token * (length / token.square().sum()) ** 0.5
    bank.bins[k, :-1] -= weight * token
    bank.bins[k, -1] -= weight
