"""Low-rank update: of each matrix the strongest singular directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vitguard.core import Traits, Update
from vitguard.defenses.base import Draws, UpdateDefense
from vitguard.defenses.sealing import require_finite
from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["LowRankUpdate"]


@dataclass(frozen=True)
class LowRankUpdate(UpdateDefense):
    """Send the `rank` strongest singular directions of each matrix; vectors are sent whole.

    What is cut is lost, or with `feedback` added to the client's next update (error feedback): so
    it arrives in the end, which large compression needs to converge. The guard keeps it, and
    `Guard.state_dict` saves it; it is a part of a plain update, and secret. The next update must be
    of the same kind and tensors and of a later round, and is refused otherwise, until
    `Guard.forget_residuals` begins anew. `Guard.forget_residuals` is also for a run on other
    weights, which nothing here can tell from the next round.

    Guarantees:
        No matrix of an update has more than `rank` directions, up to rounding of the tensor's type.
        With `feedback` the updates that leave and what is kept add up to those that were made.

    Does not protect against:
        Several updates on the same images under `feedback`: R of them together show R times `rank`
        directions, and in the end the whole gradient. A stack that stands in one round falls after
        a few. Nor is an image done with when its round is over: what was cut of it leaves later.
        `containment`: every row that is sent lies in the span of the inputs of its layer. Measured
        on 17 tokens with fixed positions: rank 8 gives the image back exactly (105 dB), rank 4 at
        74 dB, rank 2 at 17. Ranks of T / 4 and more, over all rounds on the same images together,
        give it back; up to T / 8 stood in one round. Position gradients make it worse.

    Args:
        rank: Directions of each matrix, at least 1.
        feedback: Whether what is cut is added to the next update.

    References:
        Vogels et al., arXiv:1905.13727 (PowerSGD: low rank with error feedback); docs/methods.md
        4.5.
    """

    name: ClassVar[str] = "low-rank"
    rank: int = 2
    feedback: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise expected("a rank of at least 1", self.rank)

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return the rank, and that tensors are not exact."""
        return replace(before, exact=False, rank=min(before.rank or self.rank, self.rank))

    def feeds_back(self) -> bool:
        """Whether what is cut is added to the client's next update: `feedback`."""
        return self.feedback

    def audit_note(self) -> str:
        """Say that an audit of one update sees nothing of what feedback sends later."""
        if not self.feedback:
            return ""
        return (
            f"{self.spec()} was audited on one update; with feedback, {self.rank} more directions "
            "leave with each further update on the same images"
        )

    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return each matrix cut to its strongest directions; counters (integers) stay.

        Raises:
            InputError: An entry is not finite: such a matrix has no directions.
        """
        require_finite(update)
        tensors = {n: self._cut(t) for n, t in update.tensors.items()}
        return replace(update, tensors=tensors)

    def mimic(self, dummy: Mapping[str, Tensor], seen: Update) -> dict[str, Tensor]:
        """Project on the directions that the victim sent: at the truth that is what was sent."""
        return {n: self._projected(t, seen.tensors.get(n)) for n, t in dummy.items()}

    def _cut(self, tensor: Tensor) -> Tensor:
        matrix = _matrix(tensor)
        if matrix is None or min(matrix.shape) <= self.rank:
            return tensor
        left, values, right = self._directions(matrix)
        return ((left * values) @ right).to(tensor).reshape(tensor.shape)

    def _projected(self, dummy: Tensor, seen: Tensor | None) -> Tensor:
        matrix = _matrix(dummy)
        if seen is None or matrix is None or min(matrix.shape) <= self.rank:
            return dummy
        left, _, right = (t.to(dummy) for t in self._directions(_matrix(seen)))
        return (left @ (left.mT @ matrix @ right.mT) @ right).reshape(dummy.shape)

    def _directions(self, matrix: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert matrix is not None
        left, values, right = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
        return left[:, : self.rank], values[: self.rank], right[: self.rank]


def _matrix(tensor: Tensor) -> Tensor | None:
    """Return a weight as a matrix, leading dimensions of one dropped; None for a vector."""
    while tensor.dim() > 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() < 2 or not tensor.is_floating_point() or not tensor.numel():
        return None
    return tensor.flatten(1)
