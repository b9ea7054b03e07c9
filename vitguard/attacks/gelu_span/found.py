"""Tokens of the first block that proved themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Found"]

_SAME = 3e-2  # root mean square below which two patches are one, in model-input units


@dataclass(frozen=True)
class Found:
    """Tokens that verified themselves.

    Args:
        position: Row of the family each token belongs to, shape (tokens,).
        attended: Attended values o, shape (tokens, width).
        patch: Their patches, shape (tokens, pixels).
        residual: Relative residuals, shape (tokens,).
    """

    position: Int[Tensor, " tokens"]
    attended: Float[Tensor, "tokens width"]
    patch: Float[Tensor, "tokens pixels"]
    residual: Float[Tensor, " tokens"]

    @staticmethod
    def none(like: Tensor, pixels: int) -> Found:
        """Return no token, of the device, type and width of `like`."""
        empty = like.new_zeros
        return Found(
            torch.zeros(0, dtype=torch.long, device=like.device), empty(0, like.shape[-1]),
            empty(0, pixels), empty(0),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.position)

    def pick(self, rows: Tensor) -> Found:
        """Return some of the tokens."""
        return Found(
            self.position[rows], self.attended[rows], self.patch[rows], self.residual[rows]
        )

    def plus(self, more: Found) -> Found:
        """Return these tokens and more."""
        return Found(
            torch.cat([self.position, more.position]), torch.cat([self.attended, more.attended]),
            torch.cat([self.patch, more.patch]), torch.cat([self.residual, more.residual]),
        )  # fmt: skip

    def missing(self, wanted: Int[Tensor, " positions"]) -> Int[Tensor, " positions"]:
        """Return how many of the wanted tokens each position lacks."""
        counts = torch.bincount(self.position, minlength=len(wanted))
        return (wanted - counts).clamp_min(0)

    def new(self, some: Found, wanted: Int[Tensor, " positions"]) -> Int[Tensor, " new"]:
        """Return the rows of `some` that are neither found already nor repeated, and are wanted.

        Two patches of one position that are nearly the same count as one, though they may be of two
        images that are white there: what is left of a token that was taken out can be found again.
        """
        every = torch.cat([self.patch, some.patch])
        place = torch.cat([self.position, some.position]).tolist()
        known, keep, room = list(range(len(self))), [], self.missing(wanted).tolist()
        for i in range(len(self), len(place)):
            rivals = [j for j in known if place[j] == place[i]]
            gap = (every[rivals] - every[i]).square().mean(1).sqrt()
            if bool((gap > _SAME).all()) and room[place[i]] > 0:
                keep.append(i - len(self))
                room[place[i]] -= 1
                known.append(i)
        return torch.tensor(keep, dtype=torch.long, device=some.position.device)
