"""Position shuffling: the patches of each image in a secret order, under the usual positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from recipes import Judged
from vitguard.core import Batch
from vitguard.defenses.base import BatchDefense, Draws
from vitguard.errors import expected


@dataclass(frozen=True)
class PatchOrder(BatchDefense):
    """Put the patches of each image into an order of its own before the model sees them.

    Guarantees:
        None: patches keep their content.

    Args:
        patch: Pixels on a side of a patch; as the model's.
    """

    name: ClassVar[str] = "patch-order"
    patch: int = 4

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise expected("patches of at least 1 pixel", self.patch)

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Return the batch with the patches of each image permuted."""
        size, side = batch.images.shape[-2:], self.patch
        cut = F.unfold(batch.images, side, stride=side)
        orders = [draws.uniform(cut.shape[-1]).argsort().tolist() for _ in cut]
        cut = torch.stack([one[:, order] for one, order in zip(cut, orders, strict=True)])
        return replace(batch, images=F.fold(cut, size, side, stride=side))


JUDGED = Judged(
    title="Position shuffling",
    place="positions",
    source="Yao et al., ICDM 2022 (patch shuffling, for split learning)",
    claim="A server that sees patches in a random order cannot restore the image.",
    rebuilt="Every patch of an image in a secret order before the embedding, with the usual "
    "learnable positions; the paper shuffles for split learning, where no gradient of the "
    "embedding is shared.",
    threat="The order is drawn anew for each image and secret.",
    stack=(PatchOrder(),),
    attack="position",
    found="Every patch comes back exactly, at the position where the model saw it; only their "
    "order is hidden, which the seams between patches tell in part.",
)
