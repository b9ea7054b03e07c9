"""The first linear layer of an MLP as a set of bins, each of which holds one token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vitguard.core import Bins, Crafted, Traits
from vitguard.core.parameters import canonical_tensors
from vitguard.errors import NotApplicable, expected
from vitguard.threats.crafts.base import Craft
from vitguard.threats.crafts.gates import told_apart
from vitguard.threats.crafts.homes import Home, homes_of
from vitguard.threats.crafts.own_base import NO_PLACE, feature_bins, written_beside
from vitguard.threats.crafts.writing import Writer, centred, positions_of
from vitguard.vit import Anatomy

__all__ = ["Imprint"]


@dataclass(frozen=True)
class Imprint(Craft):
    """Rows of fc1 measure a token along one direction; their thresholds are quantiles of photos.

    The gradient of a row sums the tokens above its threshold, so that neighbouring rows differ by
    the tokens between them. The patch embedding is orthogonal, attention is muted until the last
    block, which spreads one gradient over all tokens. fc2 is tiny, with equal columns: every row
    sees a token with the same weight. Positions stay what they are. Where the head averages tokens
    it reads the gradient's way itself, and the last block holds bins as well. Where the last block
    alone is trained under a class token, that turns to one position of each image, by `turn`.

    Args:
        blocks: Blocks whose MLP holds bins, the first ones; None for all that can.
        gated: Whether each row sees the tokens of one position only, which keeps sums small and
            tells positions; None where positions can be told apart. False as in the paper.
        thresholds: `bias` as in the paper: along the direction after LayerNorm. `channel` sets
            them through the reserved channel: along the direction before it, and all biases zero.
        directions: Directions to measure along at most; a token that shares its bin along one of
            them is alone along another. 1 as in the paper.
        each: Bins for each position at most. Where a layer has less rows than there are positions,
            or is an adapter, blocks see positions of their own: more where batches are large. Few
            where a defense acts on the whole tensor, which is then zero but for few rows. None for
            as many as there is room for, once all positions are seen.
        places: Positions that each block sees at most, others each turn; no limit where rows see
            all positions. None for all, and for 1 where a defense cuts tensors to a low rank.
        quiet: How much smaller the gradient of fc2 becomes, and how much larger that of the bins in
            fc1, at least 1: where clients agreed on a bound for every entry of a secure sum.
        frozen: Whether it writes what the client does not train as well. False where the client
            keeps its own frozen weights: tokens of an adapter are told apart then, no patches.
        turn: Of a server that changes the craft by the round: each turn has directions of its own.
            Tokens stay what they are, so that all turns are read together.

    Raises:
        InputError: A setting out of range.

    References:
        Robbing the Fed, arXiv 2110.13057; for Vision Transformers docs/methods.md 2.7.
    """

    name: ClassVar[str] = "imprint"
    blocks: int | None = None
    gated: bool | None = None
    thresholds: Literal["bias", "channel"] = "channel"
    directions: int = 3
    each: int | None = None
    places: int | None = None
    quiet: float = 1.0
    frozen: bool = True
    turn: int = 0

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks < 1:
            raise expected("blocks of at least 1, or None", self.blocks)
        if self.directions < 1:
            raise expected("directions of at least 1", self.directions)
        if self.each is not None and self.each < 1:
            raise expected("each of at least 1, or None", self.each)
        if self.places is not None and self.places < 1:
            raise expected("places of at least 1, or None", self.places)
        if not 1 <= self.quiet < math.inf:
            raise expected("a finite quiet of at least 1", self.quiet)
        if self.turn < 0:
            raise expected("a turn of at least 0", self.turn)

    def weights(
        self, model: nn.Module, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the crafted state dict; see `Craft.weights`."""
        generator = generator or torch.Generator().manual_seed(0)
        if self._keeps_its_own(model):
            return written_beside(model, feature_bins(model), generator)
        bins = self.bins(model)
        return Writer(
            model, bins, thresholds=self.thresholds, directions=self.directions, turn=self.turn,
            quiet=self.quiet, generator=generator,
        ).written()  # fmt: skip

    def under(self, traits: Traits) -> Imprint:
        """Let every row see all tokens where moved patches have no position of their own.

        Where matrices are cut to a low rank each one holds the tokens of one position.
        """
        gated = False if traits.shuffle is not None and self.gated is None else self.gated
        places = 1 if traits.rank and self.places is None else self.places
        return replace(self, gated=gated, places=places)

    def turned(self, turn: int) -> Imprint:
        """Return the craft with other directions to measure along, and other positions to see."""
        return replace(self, turn=self.turn + turn)

    def crafted(self, model: nn.Module) -> Crafted:
        """Return which rows are bins, and along which direction."""
        bins = tuple(self.bins(model))
        unwritten = "" if bins else "the client keeps its own frozen weights, and " + NO_PLACE
        return Crafted(self.name, self.settings(), bins, unwritten)

    def bins(self, model: nn.Module) -> list[Bins]:
        """Return the bins of each block; its last rows stay unused where they do not divide."""
        anatomy = Anatomy.of(model)
        if self._keeps_its_own(model):
            return feature_bins(model)
        homes = homes_of(model, anatomy)
        homes = homes if self.blocks is None else homes[: self.blocks]
        positions = positions_of(canonical_tensors(model), anatomy)[0]
        gated = told_apart(centred(positions)) if self.gated is None else self.gated
        if not gated and any(home.kind in ("value", "behind") for home in homes):
            raise NotApplicable("attention turns to a position: gated=false has none")
        if homes[0].turned:
            if not gated:
                raise NotApplicable("a class token turns to a position: gated=false has none")
            each = None if homes[0].kind == "head" else self.each
            rows = _rows(1, min(homes[0].rows, each or homes[0].rows))
            places = torch.tensor([self.turn % anatomy.patches])
            return [_bins(homes[0], rows, 0, places)]
        narrow = homes[0].kind != "mlp" or homes[0].rows < anatomy.patches
        if gated and (narrow or self.places is not None):
            return self._split(homes, anatomy)
        groups = anatomy.patches if gated else 1
        # an MLP that hands tokens on makes them longer: each block has weights of its own
        alone = any(home.kind == "serial" for home in homes)
        many = len(homes) if alone else min(self.directions, len(homes))
        made = []
        for i, home in enumerate(homes):
            rows = _rows(groups, min(home.rows // groups, self.each or home.rows))
            places = torch.arange(groups) if gated else None
            direction = i * many // len(homes)
            made.append(_bins(home, rows, direction, places))
        return made

    def _keeps_its_own(self, model: nn.Module) -> bool:
        return not self.frozen and not all(p.requires_grad for p in model.parameters())

    def _split(self, homes: Sequence[Home], anatomy: Anatomy) -> list[Bins]:
        """Return bins where each block sees positions of its own: layers with few rows.

        Where there are more positions than rows, each turn begins where the last one ended.
        """
        least = min(home.rows for home in homes)
        most = 1 if homes[0].kind == "behind" else self.places or anatomy.patches
        seen = min(-(-anatomy.patches // len(homes)), most)
        each = self.each or max(1, least // seen)
        if each > least:
            raise NotApplicable(
                f"{homes[0].layer} has {least} rows at most: each={each} needs more"
            )
        if each > 1 and not anatomy.prefix and any(home.kind == "value" for home in homes):
            raise NotApplicable(
                "attention needs a class token to turn to below a threshold: each=1"
            )
        per = min(least // each, most)
        begin = self.turn * per * len(homes) if per * len(homes) < anatomy.patches else 0
        order = torch.arange(anatomy.patches).roll(-begin)
        made = []
        for i, home in enumerate(homes):
            places = order[i * per : (i + 1) * per]
            if len(places):
                rows = _rows(len(places), each)
                made.append(_bins(home, rows, 0, places))
        return made


def _bins(home: Home, rows: Tensor, direction: int, places: Tensor | None) -> Bins:
    how = (home.kind, home.out, home.even, home.turned)
    return Bins(home.layer, rows, direction, places, *how)


def _rows(groups: int, each: int) -> Tensor:
    return torch.arange(each * groups).view(groups, each)
