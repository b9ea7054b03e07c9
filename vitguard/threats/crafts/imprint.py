"""The first linear layer of an MLP as a set of bins, each of which holds one token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitguard.attacks.equations.head import linear_heads
from vitguard.core import Bins, Crafted, Traits
from vitguard.errors import NotApplicable, expected
from vitguard.models import normalization_of
from vitguard.threats.crafts.base import Craft
from vitguard.threats.crafts.channels import Channels, natural_patches
from vitguard.threats.crafts.gates import Gates, told_apart
from vitguard.vit import Anatomy, Block

__all__ = ["Imprint"]

_STEEP = 1000.0  # width of a typical bin, in inputs of the activation
_BESIDE = 0.1  # what a patch adds to a gate at most, relative to the step between positions
_STRONG = 6  # waves that are mixed to directions
_LOW = 8.0  # distance at which prefix tokens stand, in steps below every threshold
_TRIES = 100
_BRIGHT = 0.1  # share of brightness in what the head reads
_UNSURE = 0.5  # score of a class at most
_FAINT = 1e-6  # size of what the bins add to a token, relative to the token


@dataclass(frozen=True)
class Imprint(Craft):
    """Rows of fc1 measure a token along one direction; their thresholds are quantiles of photos.

    The gradient of a row sums the tokens above its threshold, so that neighbouring rows differ by
    the tokens between them. The patch embedding is orthogonal, attention is muted until the last
    block, which spreads one gradient over all tokens. fc2 is tiny, with equal columns: every row
    sees a token with the same weight. Positions stay what they are.

    Args:
        blocks: Blocks whose MLP holds bins, the first ones; None for all that can.
        gated: Whether each row sees the tokens of one position only, which keeps sums small and
            tells positions; None where positions can be told apart. False as in the paper.
        thresholds: `bias` as in the paper: along the direction after LayerNorm. `channel` sets
            them through the reserved channel: along the direction before it, and all biases zero.
        directions: Directions to measure along at most; a token that shares its bin along one of
            them is alone along another. 1 as in the paper.
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
    turn: int = 0

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks < 1:
            raise expected("blocks of at least 1, or None", self.blocks)
        if self.directions < 1:
            raise expected("directions of at least 1", self.directions)
        if self.turn < 0:
            raise expected("a turn of at least 0", self.turn)

    def weights(
        self, model: nn.Module, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the crafted state dict; see `Craft.weights`."""
        generator = generator or torch.Generator().manual_seed(0)
        return _Writer(self, model, generator).written()

    def under(self, traits: Traits) -> Imprint:
        """Let every row see all tokens where moved patches have no position of their own."""
        if traits.shuffle is None or self.gated is not None:
            return self
        return replace(self, gated=False)

    def turned(self, turn: int) -> Imprint:
        """Return the craft with other directions to measure along."""
        return replace(self, turn=self.turn + turn)

    def crafted(self, model: nn.Module) -> Crafted:
        """Return which rows are bins, and along which direction."""
        return Crafted(self.name, self.settings(), tuple(self.bins(model)))

    def bins(self, model: nn.Module) -> list[Bins]:
        """Return the bins of each block; its last rows stay unused where they do not divide."""
        anatomy = Anatomy.of(model)
        blocks = usable_blocks(anatomy)
        blocks = blocks if self.blocks is None else blocks[: self.blocks]
        sizes = {n: len(p) for n, p in model.named_parameters()}
        positions = _positions(model.state_dict(), anatomy)[0]
        gated = told_apart(_centred(positions)) if self.gated is None else self.gated
        groups = anatomy.patches if gated else 1
        many = min(self.directions, len(blocks))
        made = []
        for i, block in enumerate(blocks):
            rows = sizes[f"{block.fc1}.weight"]
            each = rows // groups
            if not each:
                raise NotApplicable(
                    f"{block.fc1} has {rows} rows for {groups} positions: gated=false needs fewer"
                )
            taken = torch.arange(each * groups).view(groups, each)
            made.append(Bins(block.fc1, taken, i * many // len(blocks)))
        return made


def usable_blocks(anatomy: Anatomy) -> tuple[Block, ...]:
    """Return the blocks that can hold bins: all but the last, which spreads the gradient.

    Raises:
        NotApplicable: The architecture is another one.
    """
    anatomy.require_plain_embedding()
    blocks = anatomy.blocks
    if len(blocks) < 2:
        raise NotApplicable("it needs two blocks: one for bins, one that spreads the gradient")
    for b in blocks:
        if not (b.pre_norm and b.residual and b.centred) or b.gated:
            raise NotApplicable(f"{b.name} is no block of LayerNorm, attention and a plain MLP")
    if not anatomy.classes:
        raise NotApplicable("a model without a head")
    return blocks[:-1]


class _Writer:
    """Writes one state dict."""

    def __init__(self, craft: Imprint, model: nn.Module, generator: torch.Generator) -> None:
        self.craft, self.model, self.generator = craft, model, generator
        self.anatomy = a = Anatomy.of(model)
        self.bins = craft.bins(model)
        self.own = model.state_dict()
        self.state = {
            k: t.detach().cpu().double().clone() if t.is_floating_point() else t.clone()
            for k, t in self.own.items()
        }
        if a.patch_bias not in self.state:
            raise NotApplicable("the patch embedding has no bias to hold a constant")
        self.positions, self.prefix_positions = _positions(self.state, a)
        self.channels = Channels.of(a, self.positions, generator)
        spread = _centred(self.positions)
        size = float(spread.norm(dim=1).square().mean().sqrt())
        gated = len(self.bins[0].rows) > 1
        kept = (self.channels.scale, self.channels.signal)
        self.gates = Gates.of(spread, *kept) if gated else None
        self.constant = size if size > 1e-3 else 1.0
        self.spread = spread

    def written(self) -> dict[str, Tensor]:
        """Return the state dict in the dtypes of the model's own."""
        self._mute()
        self._embed()
        for bins in self.bins:
            self._fill(bins)
        self._read_out()
        made = {k: t.to(self.own[k]) for k, t in self.state.items()}
        if large := [k for k, t in made.items() if not bool(t.isfinite().all())]:
            raise NotApplicable(f"{large[0]} holds no number of the size it would take")
        return made

    def _mute(self) -> None:
        """Make every block the identity, and every norm a plain LayerNorm."""
        for name, tensor in self.state.items():
            kind = name.rpartition(".")[2]
            if self.anatomy.role(name) == "norm" and kind in ("weight", "bias"):
                tensor.fill_(float(kind == "weight"))
        for block in self.anatomy.blocks:
            for layer in (block.proj, block.fc2):
                self._set(f"{layer}.weight", 0.0)
                self._set(f"{layer}.bias", 0.0)
            for scale in (block.scale1, block.scale2):
                if scale is not None:
                    self._set(scale, 1.0)

    def _set(self, name: str, value: float) -> None:
        if name in self.state:
            self.state[name].fill_(value)

    def _embed(self) -> None:
        """Lay patches out in their tokens; drop prefix tokens below every threshold."""
        a, c = self.anatomy, self.channels
        waves = natural_patches(a, normalization_of(self.model), self.generator) @ c.patches
        gain = self._gain(waves)
        weight = gain * c.data @ c.patches.T
        self.state[a.patch_weight].copy_(weight.view_as(self.state[a.patch_weight]))
        self.state[a.patch_bias].copy_(self.constant * c.scale)
        self.waves = gain * waves  # along `data`
        self.lines = self._lines()
        self.reach = 4 * float(self.waves[:, :_STRONG].norm(dim=1).max())
        low = c.data @ (-2 * self.reach * _end(self.lines))
        # how long what the head reads is before its norm, at least
        read = float(low.norm()) if a.prefix and a.pooling == "token" else self.constant
        self.read = read / a.width**0.5
        self.mild = self._mild(read)
        for name in a.prefix:
            self.state[name].copy_(low.expand_as(self.state[name]))
        for row, name in enumerate(a.prefix[: len(self.prefix_positions)]):
            self.state[name] -= self.prefix_positions[row]

    def _mild(self, read: float) -> float:
        """Return the factor of the head at which no image is predicted surely, whatever it shows.

        An image that is has no gradient. So each has one of the size that its label gives it.
        """
        bright = float(self.waves[:, 0].abs().max())
        root = self.anatomy.width**0.5
        most = _BRIGHT * root * bright / (bright**2 + self.constant**2) ** 0.5
        largest = 2 * root * most / (most**2 + read**2) ** 0.5  # score of a class
        return min(1.0, _UNSURE / largest)

    def _gain(self, waves: Float[Tensor, "samples waves"]) -> float:
        """Return the factor of pixels: patches stay small beside what tells positions apart."""
        most = self.constant / self.anatomy.patch_pixels**0.5  # a pixel is about 1 in size
        if self.gates is None:
            return 0.3 * min(most, _apart(self.spread, self.constant) * most / self.constant)
        beside = waves @ (self.gates.rows @ self.channels.data).T
        return min(most, _BESIDE / max(float(beside.abs().max()), 1e-12))

    def _lines(self) -> Float[Tensor, "directions waves"]:
        """Return directions to measure along: brightness, then mixtures of the strongest waves.

        Each turn has mixtures of its own; only the first measures brightness.
        """
        many = max(b.direction for b in self.bins) + 1
        lines = torch.zeros(many, self.waves.shape[1], dtype=torch.float64)
        lines[0, 0] = 1.0
        few = min(_STRONG, self.waves.shape[1])
        sizes = self.waves[:, :few].std(0)
        turn = self.craft.turn
        source = torch.Generator().manual_seed(turn) if turn else self.generator
        for _ in range(_TRIES):
            for i in range(1 if not turn else 0, many):
                drawn = torch.randn(few, generator=source, dtype=torch.float64)
                lines[i, :few] = drawn / sizes
            lines = torch.nn.functional.normalize(lines)
            if float(_end(lines, least=0.0).norm()) <= _LOW:
                break
        return lines

    def _fill(self, bins: Bins) -> None:
        """Write the rows of one block."""
        c, (groups, each) = self.channels, bins.rows.shape
        line = c.data @ self.lines[bins.direction]
        sharing = [b for b in self.bins if b.direction == bins.direction]
        at = next(i for i, b in enumerate(sharing) if b is bins)
        rows = line.expand(groups, -1)
        if self.gates is not None:
            offset = self.gates.rows @ (self.constant * c.scale) + self.gates.own
            rows = rows + self.reach * (self.gates.rows - offset[:, None] / self.constant * c.scale)
        measured = self.waves @ (rows @ c.data).T  # samples x groups
        block = next(b for b in self.anatomy.blocks if b.fc1 == bins.layer)
        sizes = self._sizes(groups)
        if self.craft.thresholds == "bias":
            measured = measured / sizes
        levels = torch.arange(at * each, (at + 1) * each).double() / (each * len(sharing))
        cuts = torch.quantile(measured, levels.clamp(0, 1), dim=0).T  # groups x bins
        if at == 0:
            below = -self.reach / 2
            cuts[:, 0] = below / sizes.median() if self.craft.thresholds == "bias" else below
        typical = float(cuts.diff(dim=1)[:, 1:].median()) if each > 2 else float(measured.std())
        steep = _STEEP / max(typical, 1e-9)
        size = float(sizes.median())
        if self.craft.thresholds == "channel":
            steep *= size
        weight, bias = self.state[f"{bins.layer}.weight"], self.state.get(f"{bins.layer}.bias")
        weight.zero_()
        if bias is None:
            raise NotApplicable(f"{bins.layer} has no bias")
        bias.fill_(-1.0)  # rows that are not used stay off
        # so little that a token stays what it is in the next block
        most = steep / (size if self.craft.thresholds == "channel" else 1.0)
        most *= float((measured.max(0).values - cuts[:, 0]).max()) * each
        faint = _FAINT * size * self.anatomy.width**0.5 / (most * len(self.bins))
        fc2 = self.state[f"{block.fc2}.weight"]
        fc2.copy_((faint * c.signal)[:, None].expand_as(fc2))
        flat = bins.rows.flatten()
        full = rows[:, None].expand(-1, each, -1)
        share = 1.0
        if self.craft.thresholds == "channel":
            full = full - cuts[..., None] / self.constant * c.scale
            bias[flat] = 0.0
            share = self._share(faint * steep / size, float(rows.norm(dim=1).median()))
        else:
            bias[flat] = -steep * cuts.flatten()
        weight[flat] = full.flatten(0, 1) / share
        self.state[f"{block.norm2}.weight"].fill_(steep * share)

    def _share(self, slope: float, size: float) -> float:
        """Return the factor that goes from the rows into the norm before them.

        The rows' product with it stays. Their gradient becomes as large as they are, so that the
        difference of two weights keeps its digits.
        """
        gradient = self.mild * slope / self.anatomy.tokens / self.read * self.anatomy.width**0.5
        return (size / gradient) ** 0.5

    def _sizes(self, groups: int) -> Float[Tensor, "samples groups"]:
        """Return the standard deviation of each sample's token at each position."""
        c, a = self.channels, self.anatomy
        still = _centred(self.positions) + self.constant * c.scale
        if groups == 1:
            still = still[torch.randint(a.patches, (len(self.waves),), generator=self.generator)]
            square = (self.waves @ c.data.T + still).square().sum(1, keepdim=True)
        else:
            square = self.waves.square().sum(1, keepdim=True) + still.square().sum(1)
            square = square + 2 * self.waves @ (still @ c.data).T
        return (square / a.width).sqrt()

    def _read_out(self) -> None:
        """Let the last block average `signal` over all tokens, and the head read that by class."""
        a, c = self.anatomy, self.channels
        block = a.blocks[-1]
        for name in (*block.qkv, *block.qkv_bias):
            self._set(name, 0.0)
        value = self.state[block.qkv[-1]]
        first = len(value) - len(value) // 3 if len(block.qkv) == 1 else 0
        value[first] = c.signal + _BRIGHT * c.data[:, 0]  # brightness: what tells images apart
        self.state[f"{block.proj}.weight"][:, 0] = c.out
        worth = class_worth(a.classes)
        for head in linear_heads(self.model, a):
            self.state[f"{head}.weight"].copy_(self.mild * worth[:, None] * c.out)
            self._set(f"{head}.bias", 0.0)


def _end(lines: Float[Tensor, "directions waves"], least: float | None = None) -> Tensor:
    """Return where each line and brightness say 1; padded to one length for all lines.

    Prefix tokens stand at such a place, which lines of another turn must not move: their length and
    brightness reach the head.
    """
    first = torch.nn.functional.one_hot(torch.tensor([0]), lines.shape[1]).to(lines)
    ends = torch.cat([lines, first])
    end = torch.linalg.pinv(ends) @ torch.ones(len(ends), dtype=lines.dtype)
    least = _LOW if least is None else least
    if lines.shape[1] > _STRONG:
        end[_STRONG] += (least**2 - end.square().sum()).clamp_min(0).sqrt()
    return end


def _positions(state: Mapping[str, Tensor], anatomy: Anatomy) -> tuple[Tensor, Tensor]:
    """Return the position embedding of patches and of prefix tokens in float64; zeros without."""
    if anatomy.positions is None:
        none = torch.zeros(anatomy.tokens, anatomy.width, dtype=torch.float64)
        return none[anatomy.prefix_tokens :], none[:0]
    rows = state[anatomy.positions][0].detach().cpu().double()
    prefix = anatomy.position_prefix
    if len(rows) - prefix != anatomy.patches:
        raise NotApplicable("positions are resampled in the forward pass")
    return rows[prefix:], rows[:prefix]


def _centred(positions: Tensor) -> Tensor:
    return positions - positions.mean(1, keepdim=True)


def _apart(positions: Tensor, size: float) -> float:
    """Return half the smallest distance of two positions, `size` where some are the same."""
    least = float(torch.pdist(positions).min()) / 2 if len(positions) > 1 else 0.0
    return least if least > 1e-3 * size else size


def class_worth(classes: int) -> Float[Tensor, " classes"]:
    """Return what the head makes of `signal`: between 1 and 2 in size, another for each class."""
    steps = torch.arange(classes, dtype=torch.float64)
    return (1 + steps.div(2, rounding_mode="floor") / max(classes / 2, 1)) * (1 - 2 * (steps % 2))
