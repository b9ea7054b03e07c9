"""Tokens of the first block that proved themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Found"]

_SAME = 1e-3  # root mean square below which two patches are one, in model-input units
_ALIKE = 0.05  # of the spread of attended values, below which two tokens attend to the same


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

        Two patches of one position that are the same to rounding are two tokens where they attend
        to different values: two images that are white there.
        """
        every = self.plus(some)
        spread = every.attended - every.attended.mean(0)
        apart = _ALIKE * float(spread.norm(dim=1).mean())
        known, keep, room = list(range(len(self))), [], self.missing(wanted)
        for i in range(len(some)):
            p = int(some.position[i])
            rivals = [j for j in known if int(every.position[j]) == p]
            content = (every.patch[rivals] - some.patch[i]).square().mean(1).sqrt() > _SAME
            drawn = (every.attended[rivals] - some.attended[i]).norm(dim=1) > apart
            if bool((content | drawn).all()) and int(room[p]) > 0:
                keep.append(i)
                room[p] -= 1
                known.append(len(self) + i)
        return torch.tensor(keep, dtype=torch.long, device=some.position.device)
