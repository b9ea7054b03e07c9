"""Positions that share one embedding: their tokens are searched together, their order is open.

Without positions (or with equal ones) every patch stands under the same known embedding. That is
what a shuffle does to its patches, for all of them: the content is found, the order is not in the
gradient as long as attention does not tell it.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitguard.core import View
from vitguard.vit import Anatomy

__all__ = ["SAME_EQUATIONS", "all_alike", "crowds", "meets", "members"]

SAME_EQUATIONS = "without absolute positions every patch has the same equations"

_EQUAL = 1e-6  # of the offsets' size: below it tokens of one position fit at the other


def crowds(offset: Float[Tensor, "patches width"]) -> list[Int[Tensor, " members"]]:
    """Return the positions of equal offset, for every offset that several positions have."""
    size = offset.norm(dim=1).amax().clamp_min(torch.finfo(offset.dtype).tiny)
    left = torch.ones(len(offset), dtype=torch.bool, device=offset.device)
    found = []
    for first in range(len(offset)):
        if bool(left[first]):
            same = left & ((offset - offset[first]).norm(dim=1) <= _EQUAL * size)
            left &= ~same
            if int(same.sum()) > 1:
                found.append(torch.nonzero(same)[:, 0])
    return found


def all_alike(groups: list[Tensor], patches: int) -> bool:
    """Whether every position has the same offset, so that none can be told from another."""
    return len(groups) == 1 and len(groups[0]) == patches > 1


def members(groups: list[Tensor], like: Tensor) -> Bool[Tensor, " patches"]:
    """Return which of the positions of `like` are in a crowd."""
    inside = torch.zeros(len(like), dtype=torch.bool, device=like.device)
    for group in groups:
        inside[group] = True
    return inside


def meets(view: View, anatomy: Anatomy, groups: list[Tensor]) -> bool:
    """Whether a shuffle's embedding is what all positions have: then it only changes the order."""
    unknown = view.unknown
    if anatomy.positions is None or unknown is None:
        return True
    rows = view.weight(anatomy.positions)[0, anatomy.position_prefix :]
    away = (rows - unknown.detach().to(rows).reshape(-1, rows.shape[1])[:1]).norm(dim=1)
    size = view.weight(anatomy.patch_weight).flatten(1).norm(dim=1).mean()
    return all_alike(groups, anatomy.patches) and bool((away <= _EQUAL * size).all())
