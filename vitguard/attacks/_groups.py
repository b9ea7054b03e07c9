"""Which tokens of a batch share an image, before any image is complete.

The tokens of one image attend to the same values, so their attended values o lie closer together
than those of two images: little apart where attention is broad, as in untrained models and in
first blocks. This is a guess that orders drafts and directs searches; `Attention.membership`
proves.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["group_tokens"]

_ROUNDS = 12
_NEW = 0.5  # of the distance between known groups: what lies further from all opens another


def group_tokens(
    attended: Float[Tensor, "tokens dim"], position: Int[Tensor, " tokens"], images: int
) -> tuple[Int[Tensor, " tokens"], Float[Tensor, "groups dim"]]:
    """Return the group of every token, and the mean attended values of each group.

    Two tokens of one position are never in one group, as long as no position has more than
    `images`. Every group has a token, so there may be fewer than `images`.

    Args:
        attended: Attended values o in any orthonormal coordinates.
        position: Where in the image each token stands.
        images: Of the batch.
    """
    device, attended = attended.device, attended.cpu()  # sums in the same order on every device
    place = position.tolist()
    members = {p: [t for t in range(len(place)) if place[t] == p] for p in sorted(set(place))}
    crowded = max(members.values(), key=len)[:images]
    centers = attended[crowded]
    groups = _assign(attended, centers, members)
    for _ in range(_ROUNDS):
        centers = _means(attended, groups, centers)
        if len(centers) < images and len(centers) > 1:
            centers = _opened(attended, centers)
        new = _assign(attended, centers, members)
        if torch.equal(new, groups):
            break
        groups = new
    used, groups = torch.unique(groups, return_inverse=True)
    return groups.to(device), _means(attended, groups, centers[used]).to(device)


def _means(attended: Tensor, groups: Tensor, centers: Tensor) -> Tensor:
    sums = torch.zeros_like(centers).index_add_(0, groups, attended)
    counts = torch.bincount(groups, minlength=len(centers)).to(centers)[:, None]
    return torch.where(counts > 0, sums / counts.clamp_min(1), centers)


def _opened(attended: Tensor, centers: Tensor) -> Tensor:
    """Add the token that lies furthest from all groups, where that is far."""
    between = torch.cdist(centers, centers)
    between.fill_diagonal_(torch.inf)
    nearest = torch.cdist(attended, centers).amin(1)
    if float(nearest.max()) < _NEW * float(between.min()):
        return centers
    return torch.cat([centers, attended[nearest.argmax()][None]])


def _assign(attended: Tensor, centers: Tensor, members: dict[int, list[int]]) -> Tensor:
    """Give the tokens of each position to different groups, nearest ones first."""
    distance = torch.cdist(attended, centers).numpy()
    groups = torch.zeros(len(attended), dtype=torch.long)
    for tokens in members.values():
        rows, columns = linear_sum_assignment(distance[tokens])
        groups[[tokens[row] for row in rows]] = torch.tensor(columns)
    return groups
