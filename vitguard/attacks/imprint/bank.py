"""The gradients of bins as sums over tokens, and one group's bins taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.core import Bins, View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = ["Bank", "Single", "Tokens", "banks_of", "peeled"]

_ROUNDS = 64  # of peeling; photos take a handful
_SAME = 1e-3  # relative difference of columns that were written alike, in 16-bit numbers too
_NEAR = 8.0  # inputs of the activation within which a row is neither off nor wholly on


@dataclass(frozen=True, eq=False)
class Bank:
    """All bins along one direction, by ascending threshold; float64.

    Args:
        bins: Difference of neighbouring rows: the weighted sum of the tokens after LayerNorm
            between two thresholds, and the sum of their weights; shape (groups, bins, width + 1).
        rows, bias: What a row makes of a token after LayerNorm, shapes (groups, bins, width) and
            (groups, bins): it counts the token where the result is above 0.
    """

    bins: Float[Tensor, "groups bins width_and_bias"]
    rows: Float[Tensor, "groups bins width"]
    bias: Float[Tensor, "groups bins"]

    def inputs(self, token: Tensor, group: int, rows: slice = slice(None)) -> Float[Tensor, " n"]:
        """Return what the rows of a group make of a token."""
        return self.rows[group, rows] @ token + self.bias[group, rows]


def banks_of(view: View, anatomy: Anatomy, bins: Sequence[Bins]) -> list[Bank]:
    """Return the banks of an update, one for each direction.

    Raises:
        Blocked: The gradient of fc1, weight or bias, cannot be read.
    """
    directions = sorted({b.direction for b in bins})
    return [_bank(view, anatomy, [b for b in bins if b.direction == d]) for d in directions]


def _bank(view: View, anatomy: Anatomy, bins: Sequence[Bins]) -> Bank:
    sums, rows, biases = [], [], []
    for one in bins:
        block = next(b for b in anatomy.blocks if b.fc1 == one.layer)
        gain, shift = view.weight(f"{block.norm2}.weight"), view.weight(f"{block.norm2}.bias")
        columns = view.weight(f"{block.fc2}.weight")[:, one.rows.flatten()]
        faint = columns[:, 0].norm()
        if not bool(((columns - columns[:, :1]).norm(dim=0) <= _SAME * faint).all()):
            raise NotApplicable(f"{block.fc2} is not what the craft writes: the weights are others")
        weight, bias = view.weight(f"{one.layer}.weight"), view.weight(f"{one.layer}.bias")
        count = view.read(f"{one.layer}.bias")[one.rows] / faint
        total = view.read(f"{one.layer}.weight")[one.rows] / faint
        total = (total - count[..., None] * shift) / gain
        sums.append(torch.cat([total, count[..., None]], -1))
        rows.append(weight[one.rows] * gain)
        biases.append(bias[one.rows] + weight[one.rows] @ shift)
    whole = torch.cat(sums, 1)
    if not bool(whole.isfinite().all()):
        raise NotApplicable("the update is not finite")
    whole[:, :-1] -= whole[:, 1:].clone()
    charge(elements=0.3 * whole.numel())
    return Bank(whole, torch.cat(rows, 1), torch.cat(biases, 1))


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

    def doubt(self, tokens: Float[Tensor, "n width"], places: Tensor) -> Float[Tensor, " n"]:
        """Return a bound on how far each is from a single token, before LayerNorm.

        Tokens after LayerNorm have one length, and a mixture of two is shorter (longer, where
        their weights have opposite signs): what the square of its length lacks bounds how far it
        is from the nearer one. Where no patch reaches, a token is what its position adds; how far
        it is from that counts as well. Infinite for what has another length altogether: however
        small the size that undoes LayerNorm, it is no token.
        """
        scales = self.scales(tokens, places)
        length = tokens.shape[1] * (1 - self.eps / scales.square().clamp_min(self.eps))
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
    """

    token: Tensor
    place: int
    weight: float
    doubt: float
    whole: bool


def peeled(
    banks: Sequence[Bank], group: int, tokens: Tokens, *, gated: bool, allowed: float, least: float
) -> list[Single]:
    """Return the single tokens of a group; each is taken out of the bins along other directions.

    Args:
        gated: Whether a group sees the tokens of its own position only.
        allowed: Doubt up to which a bin holds one token.
        least: Weight below which a bin is empty.
    """
    place = group if gated else None
    open_ = [torch.ones_like(bank.bias[group], dtype=torch.bool) for bank in banks]
    found: list[Single] = []
    for _ in range(_ROUNDS):
        fresh = [
            single
            for bank, at in zip(banks, open_, strict=True)
            for single in _singles(bank, group, at, tokens, place, allowed, least)
        ]
        taken = 0
        for single in sorted(fresh, key=lambda one: (not one.whole, one.doubt)):
            if _known(single, found):
                continue
            found.append(single)
            taken += 1
            for bank, at in zip(banks, open_, strict=True):
                _take_out(single, bank, group, at)
        if not taken:
            break
    return found


def _singles(
    bank: Bank,
    group: int,
    open_: Tensor,
    tokens: Tokens,
    place: int | None,
    allowed: float,
    least: float,
) -> list[Single]:
    """Return the tokens that are alone in a bin."""
    bins = bank.bins[group]
    at = ((bins[:, -1].abs() > least) & open_).nonzero()[:, 0]
    if not len(at):
        return []
    mean = bins[at, :-1] / bins[at, -1:]
    charge(elements=0.4 * mean.numel(), calls=12)
    places = tokens.places(mean) if place is None else torch.full_like(at, place)
    doubt = tokens.doubt(mean, places)
    made = []
    for j in (doubt <= allowed).nonzero()[:, 0].tolist():
        around = bank.inputs(mean[j], group, slice(int(at[j]), int(at[j]) + 2))
        whole = bool((around.abs() >= _NEAR).all())
        made.append(Single(mean[j], int(places[j]), float(bins[at[j], -1]), float(doubt[j]), whole))
    return made


def _known(single: Single, found: Sequence[Single]) -> bool:
    """Whether it is the same token again: along another direction, in part, or taken out twice."""
    alike = [
        f.token
        for f in found
        if not single.whole or abs(abs(f.weight) - abs(single.weight)) < 1e-3 * abs(f.weight)
    ]
    if not alike:
        return False
    apart = (torch.stack(alike) - single.token).square().sum(1)
    return bool((apart < 1e-7 * single.token.square().sum()).any())


def _take_out(single: Single, bank: Bank, group: int, open_: Tensor) -> None:
    """Subtract a token from the bin that it lies in, or close the bins that hold a part of it."""
    charge(products=2.0 * bank.rows[group].numel(), calls=6)
    inputs = bank.inputs(single.token, group)
    near = (inputs.abs() < _NEAR).nonzero()[:, 0].tolist()
    for n in near:
        open_[max(n - 1, 0) : n + 1] = False
    k = int((inputs > 0).sum()) - 1
    if k < 0 or near:
        return
    if not single.whole:
        open_[k] = False
        return
    bins = bank.bins[group]
    bins[k, :-1] -= single.weight * single.token
    bins[k, -1] -= single.weight
