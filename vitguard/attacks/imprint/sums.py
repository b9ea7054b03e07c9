"""The gradients of a malicious server's bins as sums over tokens, wherever it put them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.attacks.imprint.bank import Bank
from vitguard.core import Bins, View
from vitguard.core.parameters import canonical_tensors
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy, Block

__all__ = ["banks_of", "lone_features"]

_SAME = 1e-3  # relative difference of columns that were written alike, in 16-bit numbers too
_SMOOTH = 0.4  # an attention head is a sigmoid, which is slower than GELU to be off or wholly on
_ONE = 1e-3  # what the square of the length of a single token lacks at most: eps, and rounding
_EMPTY = 1e-3  # weight of a bin without a token, relative to the largest
_LOUD = 0.3  # change of the count that is a token where gradients have noise, of the largest one
_TOLD = 0.1  # of the class token: what tells it from patches, relative to its length
_ROUNDING = 1e-5  # of 32-bit weights: what is shorter is no direction


def banks_of(
    view: View, anatomy: Anatomy, bins: Sequence[Bins], prefix: Float[Tensor, "prefix width"],
    still: Float[Tensor, "positions width"], back: Float[Tensor, "pixels width"], eps: float,
    noisy: bool = False,
) -> list[Bank]:  # fmt: skip
    """Return the banks of an update, one for each direction and position.

    Args:
        prefix: Prefix tokens as they enter the first block.
        still, back, eps: As in `Tokens`.
        noisy: Whether rows between which no token lies are averaged.

    Raises:
        Blocked: The gradient of the layer that holds the bins cannot be read.
    """
    parts: dict[tuple[int, int | None], list[_Sums]] = {}
    longer = 0.0
    for one in bins:
        sums = _sums(view, anatomy, one, longer)
        if one.kind == "serial":
            longer += sums.added
        elif one.kind == "value" and len(prefix):
            sums = _without(sums, prefix[0], still, back, eps)
        for group in range(len(one.rows)):
            place = None if one.places is None else int(one.places[group])
            parts.setdefault((one.direction, place), []).append(sums.of(group))
    loud = _LOUD if noisy else 0.0
    return [_bank(group, place, loud) for (_, place), group in sorted(parts.items(), key=_order)]


def lone_features(view: View, anatomy: Anatomy, one: Bins) -> int:
    """Return how many tokens stand alone in bins of weights that the server did not write.

    What an adapter reads there has the length of one token after LayerNorm, and is no patch:
    attention has mixed them before.
    """
    (bank,) = (_bank([_sums(view, anatomy, one, 0.0).of(0)], None),)
    weights = bank.bins[:, -1]
    mean = bank.bins[:, :-1] / weights[:, None]
    lacks = (mean.square().sum(1) / mean.shape[1] - 1).abs()
    return int(((lacks < _ONE) & (weights.abs() > _EMPTY * weights.abs().max())).sum())


def _order(item: tuple[tuple[int, int | None], list[_Sums]]) -> tuple[int, int]:
    (direction, place), _ = item
    return direction, -1 if place is None else place


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of rows: the weighted sum of all tokens above a threshold after LayerNorm, and of weights."""

    sums: Tensor
    rows: Tensor
    bias: Tensor
    longer: float
    added: float
    gain: float = 0.0

    def of(self, group: int) -> _Sums:
        rows = self.sums[group], self.rows[group], self.bias[group]
        return _Sums(*rows, self.longer, self.added, self.gain)


def _bank(parts: Sequence[_Sums], place: int | None, loud: float = 0.0) -> Bank:
    whole = torch.cat([part.sums for part in parts])
    if not bool(whole.isfinite().all()):
        raise NotApplicable("the update is not finite")
    made = _steps(whole, loud) if loud else whole
    made[:-1] -= made[1:].clone()
    charge(elements=0.3 * whole.numel())
    rows, bias = (torch.cat([getattr(p, name) for p in parts]) for name in ("rows", "bias"))
    return Bank(made, rows, bias, place, parts[0].longer, parts[0].added, parts[0].gain)


def _steps(whole: Float[Tensor, "rows width_and_count"], loud: float) -> Tensor:
    """Return the sums where rows between which no token lies have their mean: less noise of each.

    Args:
        loud: Share of the largest change of the count from which a token lies between two rows.
    """
    change = whole[:, -1].diff().abs()
    if not len(change):
        return whole
    step = (change > loud * change.max().clamp_min(loud * whole[:, -1].abs().max())).cumsum(0)
    run = torch.cat([step.new_zeros(1), step])
    runs = torch.nn.functional.one_hot(run).to(whole)
    return (runs / runs.sum(0)) @ (runs.T @ whole)


def _sums(view: View, anatomy: Anatomy, one: Bins, longer: float) -> _Sums:
    block = next(b for b in anatomy.blocks if one.layer.startswith(f"{b.name}."))
    norm = block.norm1 if one.kind in ("value", "behind") else block.norm2
    gain, shift = view.weight(f"{norm}.weight"), view.weight(f"{norm}.bias")
    if one.kind == "behind":  # attention gives it, shorter
        length = view.weight(f"{block.proj}.weight")[0, 0]
        gain, shift = length * gain, length * shift
    columns, weight, bias = _written(view, block, one)
    columns = columns[:, one.rows.flatten()]
    faint = columns[:, 0].norm()
    if not bool(((columns - columns[:, :1]).norm(dim=0) <= _SAME * faint).all()):
        raise NotApplicable(f"{one.out} is not what the craft writes: the weights are others")
    total = view.read(f"{one.layer}.weight")[one.rows] / faint
    if f"{one.layer}.bias" in canonical_tensors(view.model) and not bool(shift.any()):
        count = view.read(f"{one.layer}.bias")[one.rows] / faint
    else:  # tokens have mean zero: what the norm adds to all channels counts them
        count = (total / gain).mean(-1) / (shift / gain).mean()
    total = (total - count[..., None] * shift) / gain
    return _Sums(
        torch.cat([total, count[..., None]], -1),
        weight * gain,
        bias + weight @ shift,
        longer,
        float(gain[0]) if one.kind == "serial" else torch.inf if one.even else 0.0,
        float(view.weight(f"{block.proj}.weight")[0, 0]) if one.turned else 0.0,
    )


def _written(view: View, block: Block, one: Bins) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the craft wrote: columns that carry the gradient back, thresholds of the rows.

    Returns:
        Columns of all rows, shape (width, rows); weights, (groups, bins, width); biases.
    """
    columns = view.weight(f"{one.out}.weight")
    if one.kind not in ("lora", "value"):
        weight, bias = view.weight(f"{one.layer}.weight"), view.bias(one.layer)
        return columns, weight[one.rows], bias[one.rows]
    up = view.weight(one.layer.replace(".lora_A.", ".lora_B.") + ".weight")
    if one.kind == "lora":
        weight, bias = view.weight(f"{block.fc1}.weight"), view.bias(block.fc1)
        return columns @ up, (up.T @ weight)[one.rows], (up.T @ bias)[one.rows]
    up = up[-len(columns) :]
    at = up.abs().argmax(0)
    joint = len(block.qkv) == 1
    key = view.weight(block.qkv[0]).chunk(3)[1] if joint else view.weight(block.qkv[1])
    weight = _SMOOTH * key[at][one.rows] * (len(columns) // block.heads) ** -0.5
    return columns @ up, weight, weight.new_zeros(weight.shape[:2])


def _without(sums: _Sums, prefix: Tensor, still: Tensor, back: Tensor, eps: float) -> _Sums:
    """Take the class token out, to which heads turn below a threshold.

    Patches have nothing along a direction that neither they nor their positions reach.
    """
    token = torch.nn.functional.layer_norm(prefix, prefix.shape, eps=eps)
    reached = torch.nn.functional.normalize(torch.cat([torch.ones_like(token)[None], back, still]))
    charge(svd=float(reached.numel() * min(reached.shape)))
    _, sizes, rows = torch.linalg.svd(reached, full_matrices=False)
    rows = rows[sizes > _ROUNDING * sizes[0]]
    told = token - rows.T @ (rows @ token)
    if float(told.norm()) < _TOLD * float(token.norm()):
        raise NotApplicable("the class token is not told from patches: the weights are others")
    whole = sums.sums.clone()
    weight = whole[..., :-1] @ told / (token @ told)
    whole[..., :-1] -= weight[..., None] * token
    whole[..., -1] -= weight
    return _Sums(whole, sums.rows, sums.bias, sums.longer, sums.added)
