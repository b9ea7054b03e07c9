"""Random binary weights: a random half of the update's entries, the others zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from recipes import Judged
from vitguard.core import Traits, Update
from vitguard.defenses.base import Draws, UpdateDefense
from vitguard.errors import expected
from vitguard.vit import Anatomy


@dataclass(frozen=True)
class BinaryWeights(UpdateDefense):
    """Multiply each entry of the update by a secret 0 or 1.

    Guarantees:
        None: what is sent is exact, and the zeros tell which entries were not.

    Args:
        keep: Chance of a 1, above 0 and at most 1.
    """

    name: ClassVar[str] = "binary-weights"
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise expected("keep above 0 and at most 1", self.keep)

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return that entries are missing, and matrices of any rank."""
        return replace(before, exact=False, sparse=True, rank=0)

    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return the update with every entry kept or zeroed by chance."""
        tensors = {n: t * self._drawn(t, draws) for n, t in update.tensors.items()}
        return replace(update, tensors=tensors)

    def _drawn(self, like: Tensor, draws: Draws) -> Tensor:
        chosen = torch.from_numpy(draws.chosen(like.numel(), self.keep).copy())
        return chosen.reshape(like.shape).to(like)

    def mimic(self, dummy: Mapping[str, Tensor], seen: Update) -> dict[str, Tensor]:
        """Keep the entries that the victim kept."""
        zeros = torch.zeros(())
        return {n: t * (seen.tensors.get(n, zeros.to(t) + 1) != 0) for n, t in dummy.items()}


JUDGED = Judged(
    title="Random binary weights",
    place="update",
    source="Sawada, Imaizumi, Kiya, arXiv:2409.19988",
    claim="An update multiplied by a secret random sequence of zeros and ones resists the APRIL "
    "attack, and accuracy does not fall.",
    rebuilt="Each entry of every tensor is kept with chance 1/2. The abstract was read; the share "
    "of ones was not found.",
    threat="The sequence is secret, but zeros are seen.",
    stack=(BinaryWeights(),),
    attack="map:seconds=20",
    found="",
    side=16,
    images=1,
)
