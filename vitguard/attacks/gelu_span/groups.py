"""Which tokens of a batch share an image, before any image is complete.

The tokens of one image attend to the same values, so their attended values o lie around one mean.
Most of what sets them apart from it is known: each token's query weighs the keys of the tokens
grouped with it. What remains is a small fraction of the spread of one image, so the right groups
have the least remainder even where two images are alike. This is a guess that orders drafts and
directs searches; `Attention.membership` proves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.attacks.equations.attention import AttentionDraws

__all__ = ["group_tokens"]

_ROUNDS = 15
_SWAPS = 40  # groups given up for one that begins at an ill-fitting token


def group_tokens(
    attended: Float[Tensor, "tokens width"],
    position: Int[Tensor, " tokens"],
    images: int,
    draws: AttentionDraws | None = None,
    room: Sequence[int] = (),
) -> Int[Tensor, " tokens"]:
    """Return the group of every token: 0, 1, ... without gaps, at most `images` of them.

    Two tokens of one position are never in one group, as long as no position has more than
    `images`, or more than its `room`. There are `images` groups unless there are fewer tokens;
    where no token of an image is known, one of the others is cut in two.

    Args:
        attended: Attended values o.
        position: Where in the image each token stands.
        images: Of the batch.
        draws: What the tokens draw from each other; without it groups are balls around their means.
        room: Tokens of one image that each position takes; one where nothing is said.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = _Tokens(attended.cpu().float(), position.tolist(), draws, room)
    seeds = max(tokens.rivals, key=len)[:images]
    split = tokens.settled(torch.cdist(tokens.attended, tokens.attended[seeds]).square())
    while split.misfit.shape[1] < min(images, len(attended)):
        away = tokens.beginning(int(split.own.argmax()))
        split = tokens.settled(torch.cat([split.misfit, away], 1))
    split = tokens.swapped(split, generator)
    return torch.unique(split.groups, return_inverse=True)[1].to(attended.device)


@dataclass(frozen=True)
class _Split:
    """Groups, and the squared distance of every token to what each group expects of it."""

    groups: Tensor
    misfit: Tensor

    @property
    def own(self) -> Tensor:
        return self.misfit[torch.arange(len(self.groups)), self.groups]


class _Tokens:
    def __init__(
        self,
        attended: Tensor,
        place: list[int],
        draws: AttentionDraws | None,
        room: Sequence[int],
    ) -> None:
        self.attended, self.draws = attended, draws
        places = sorted(set(place))
        self.rivals = [[t for t, q in enumerate(place) if q == p] for p in places]
        self.room = [max(room[p], 1) if p < len(room) else 1 for p in places]

    def beginning(self, token: int) -> Float[Tensor, "tokens one"]:
        """The misfits to a group of one token."""
        return (self.attended - self.attended[token]).square().sum(1, keepdim=True)

    def settled(self, misfit: Float[Tensor, "tokens groups"]) -> _Split:
        """Assign and expect in turn until nothing moves."""
        groups = self._assigned(misfit)
        for _ in range(_ROUNDS):
            misfit = self._misfit(groups, misfit.shape[1])
            new = self._assigned(misfit)
            if torch.equal(new, groups):
                break
            groups = new
        return _Split(groups, self._misfit(groups, misfit.shape[1]))

    def swapped(self, best: _Split, generator: torch.Generator) -> _Split:
        """Give up one group after the other for one that begins at an ill-fitting token."""
        count = best.misfit.shape[1]
        if count < 2 or not float(best.own.sum()) > 0:
            return best
        for _ in range(_SWAPS):
            token = int(torch.multinomial(best.own + best.own.mean(), 1, generator=generator))
            trial = best.misfit.clone()
            given = int(torch.randint(count, (1,), generator=generator))
            trial[:, given : given + 1] = self.beginning(token)
            split = self.settled(trial)
            if float(split.own.sum()) < float(best.own.sum()):
                best = split
        return best

    def _misfit(self, groups: Tensor, count: int) -> Float[Tensor, "tokens groups"]:
        columns, (tokens, width) = [], self.attended.shape
        pairs = 0 if self.draws is None else self.draws.weights.numel()
        passes = 0.3 * pairs + tokens * width
        products = 2.0 * tokens * width * tokens if pairs else 0.0
        charge(products=count * products, elements=count * passes, share=0.5)
        charge(calls=15 * count + 6 * len(self.rivals))  # and the assignment that follows
        for index in range(count):
            group = groups == index
            rest = self.attended if self.draws is None else self.attended - self.draws.of(group)
            mean = rest[group].mean(0) if bool(group.any()) else rest.mean(0)
            columns.append((rest - mean).square().sum(1))
        return torch.stack(columns, 1)

    def _assigned(self, misfit: Float[Tensor, "tokens groups"]) -> Int[Tensor, " tokens"]:
        """Give the tokens of each position to different groups, those that fit best first."""
        from scipy.optimize import linear_sum_assignment

        cost, groups = misfit.numpy(), torch.zeros(len(misfit), dtype=torch.long)
        for tokens, room in zip(self.rivals, self.room, strict=True):
            rows, columns = linear_sum_assignment(cost[tokens].repeat(room, 1))
            groups[[tokens[row] for row in rows]] = torch.tensor(columns // room)
        return groups
