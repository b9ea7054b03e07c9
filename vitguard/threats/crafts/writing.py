"""What imprint writes into each layer of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitguard.attacks.equations.head import linear_heads
from vitguard.core import Bins
from vitguard.errors import NotApplicable
from vitguard.models import normalization_of
from vitguard.threats.crafts.channels import Channels, natural_patches
from vitguard.threats.crafts.gates import Gates
from vitguard.threats.crafts.gating import attend, hand_on, scale_norm, stand_for, turn_to
from vitguard.threats.crafts.homes import bottlenecks
from vitguard.threats.crafts.pools import averages
from vitguard.vit import Anatomy, Block, canonical_name

__all__ = ["Writer", "centred", "class_worth", "positions_of"]

_STEEP = 1000.0  # width of a typical bin, in inputs of the activation
_BESIDE = 0.1  # what a patch adds to a gate at most, relative to the step between positions
_STRONG = 6  # waves that are mixed to directions
_LOW = 8.0  # distance at which prefix tokens stand, in steps below every threshold
_TRIES = 100
_BRIGHT = 0.1  # share of brightness in what the head reads
_UNSURE = 0.5  # score of a class at most
_LONGER = 100.0  # how much longer an MLP makes a token that it hands on, relative to the token
_OFF = -100.0  # an input at which no activation has a slope
_FAINT = 1e-6  # size of what the bins add to a token, relative to the token


class Writer:
    """Writes one state dict.

    Args:
        model: The public model; it is not changed.
        bins: Where rows are bins.
        thresholds, turn, quiet: As in `Imprint`.
        directions: To measure along at most; bins of further numbers begin again.
        generator: Of the draws.
    """

    def __init__(
        self,
        model: nn.Module,
        bins: Sequence[Bins],
        *,
        thresholds: Literal["bias", "channel"],
        directions: int,
        turn: int,
        quiet: float = 1.0,
        generator: torch.Generator,
    ) -> None:
        self.quiet = quiet
        self.model, self.bins, self.generator = model, bins, generator
        self.thresholds, self.directions, self.turn = thresholds, directions, turn
        self.anatomy = a = Anatomy.of(model)
        self.own = model.state_dict()
        self.state = {
            canonical_name(k): t.detach().cpu().double().clone()
            if t.is_floating_point()
            else t.clone()
            for k, t in self.own.items()
        }
        if a.patch_bias not in self.state:
            raise NotApplicable("the patch embedding has no bias to hold a constant")
        self.positions, self.prefix_positions = positions_of(self.state, a)
        self.averaged = averages(a) and not any(b.kind == "serial" for b in bins)
        self.turned = bins[0].turned
        self.direct = self.averaged or self.turned
        attention = any(b.kind in ("value", "behind") for b in bins)
        if any(b.kind == "value" for b in bins) and thresholds == "bias":
            raise NotApplicable("an attention head has no bias for a threshold: thresholds=channel")
        self.attention = attention
        self.channels = Channels.of(a, self.positions, generator, sink=attention)
        spread = centred(self.positions)
        size = float(spread.norm(dim=1).square().mean().sqrt())
        kept = [self.channels.scale, self.channels.signal]
        kept += [self.channels.sink] if attention else []
        self.gates = Gates.of(spread, *kept) if bins[0].places is not None else None
        self.constant = size if size > 1e-3 else 1.0
        self.spread = spread
        longer = _LONGER * self.constant / a.width**0.5
        self.grown = 0.0
        self.before: dict[str, float] = {}
        for one in bins:
            self.before[one.layer] = self.grown
            self.grown += longer if one.kind == "serial" else 0.0
        self.longer = longer

    def written(self) -> dict[str, Tensor]:
        """Return the state dict in the dtypes of the model's own."""
        self._mute()
        self._embed()
        for bins in self.bins:
            if bins.kind != "head":
                self._fill(bins)
        self._read_out()
        made = {k: self.state[canonical_name(k)].to(t) for k, t in self.own.items()}
        if large := [k for k, t in made.items() if not bool(t.isfinite().all())]:
            raise NotApplicable(f"{large[0]} holds no number of the size it would take")
        return made

    def _mute(self) -> None:
        """Make every block the identity, every norm a plain LayerNorm, and adapters silent."""
        for name, tensor in self.state.items():
            kind = name.rpartition(".")[2]
            if self.anatomy.role(name) == "norm" and kind in ("weight", "bias"):
                tensor.fill_(float(kind == "weight"))
            if ".lora_" in name:
                tensor.zero_()
        for block in self.anatomy.blocks:
            for layer in (block.proj, block.fc2, *(up for _, up in bottlenecks(self.model, block))):
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
        if self.attention:
            low = low + float(low.norm()) * c.sink
        if self.turned:
            low = torch.zeros_like(low)
        self.prefix = low
        # how long what the head reads is before its norm, at least
        read = float(low.norm()) if a.prefix and a.pooling == "token" else self.constant
        read += self.grown * a.width**0.5
        if self.turned:  # as long as the token that it turned to
            read = float(self._sizes(self.bins[0]).median()) * a.width**0.5
        self.read = read / a.width**0.5
        self.mild = self._mild(read) / self.quiet
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
        largest = 2 * most  # score of a class
        if not self.direct:  # attention writes it, and another norm divides it
            largest *= root / (most**2 + read**2) ** 0.5
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
        many = min(max(b.direction for b in self.bins) + 1, self.directions)
        lines = torch.zeros(many, self.waves.shape[1], dtype=torch.float64)
        lines[0, 0] = 1.0
        few = min(_STRONG, self.waves.shape[1])
        sizes = self.waves[:, :few].std(0)
        turn = self.turn
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
        line = c.data @ self.lines[bins.direction % len(self.lines)]
        sharing = [b for b in self.bins if b.direction == bins.direction and _alike(b, bins)]
        at = next(i for i, b in enumerate(sharing) if b is bins)
        rows = line.expand(groups, -1)
        if self.gates is not None:
            gates, own = self.gates.rows[bins.places], self.gates.own[bins.places]
            offset = gates @ (self.constant * c.scale) + own
            rows = rows + self.reach * (gates - offset[:, None] / self.constant * c.scale)
        measured = self.waves @ (rows @ c.data).T  # samples x groups
        sizes = self._sizes(bins)
        if self.thresholds == "bias":
            measured = measured / sizes
        levels = torch.arange(at * each, (at + 1) * each).double() / (each * len(sharing))
        cuts = torch.quantile(measured, levels.clamp(0, 1), dim=0).T  # groups x bins
        if at == 0:
            below = -self.reach / 2
            cuts[:, 0] = below / sizes.median() if self.thresholds == "bias" else below
        typical = float(cuts.diff(dim=1)[:, 1:].median()) if each > 2 else float(measured.std())
        steep = _STEEP / max(typical, 1e-9)
        size = float(sizes.median())
        if self.thresholds == "channel":
            steep *= size
        most = steep / (size if self.thresholds == "channel" else 1.0)
        most *= float((measured.max(0).values - cuts[:, 0]).max()) * each
        # so little that a token stays what it is in the next block
        longer = self.before[bins.layer] + (self.longer if bins.kind == "serial" else 0.0)
        faint = _FAINT * (size + longer) * self.anatomy.width**0.5 / (most * len(self.bins))
        full = rows[:, None].expand(-1, each, -1)
        bias = -steep * cuts.flatten()
        if self.thresholds == "channel":
            full = full - cuts[..., None] / self.constant * c.scale
            bias = torch.zeros_like(bias)
        full = full.flatten(0, 1)
        share = 1.0
        if self.thresholds == "channel":
            slope = faint * steep / (1.0 if self.direct else size)
            share = self._share(slope, float(rows.norm(dim=1).median()))
        block = next(b for b in self.anatomy.blocks if bins.layer.startswith(f"{b.name}."))
        if bins.kind == "value":
            scale_norm(self.state, block.norm1, steep, counts=True)
            attend(self.state, bins, block, full, c, self.prefix)
            return
        if bins.kind == "serial":
            share = self.longer / steep
            hand_on(self.state, block)
        elif bins.kind == "behind":
            share = self._turn(bins, block, _FAINT * size)
        elif bins.kind == "lora":
            share = 1.0
            stand_for(self.state, bins)
        gate = block.fc1 if bins.kind == "lora" else bins.layer
        flat = bins.rows.flatten()
        weight = self.state[f"{gate}.weight"]
        weight.zero_()
        weight[flat] = full / share * (steep if bins.kind == "behind" else 1.0)
        if f"{gate}.bias" in self.state:
            self._set(f"{gate}.bias", _OFF)  # rows that are not used have no gradient
            self.state[f"{gate}.bias"][flat] = bias
        elif self.thresholds == "bias" or bins.kind in ("mlp", "lora"):
            raise NotApplicable(f"{gate} has no bias")
        self.state[f"{bins.out}.weight"].copy_((faint * c.signal)[:, None])
        counts = f"{bins.layer}.bias" not in self.state or self.quiet > 1  # a bias stays small
        if bins.kind == "behind":
            scale_norm(self.state, block.norm1, 1.0, counts=counts)
            return
        scale_norm(self.state, block.norm2, steep * share, counts=counts)

    def _share(self, slope: float, size: float) -> float:
        """Return the factor that goes from the rows into the norm before them.

        The rows' product with it stays. Their gradient becomes as large as they are, so that the
        difference of two weights keeps its digits.
        """
        many = 1 if self.turned else self.anatomy.tokens
        gradient = self.mild * slope / many / self.read * self.anatomy.width**0.5
        return (size / gradient) ** 0.5 * self.quiet**1.5

    def _sizes(self, bins: Bins) -> Float[Tensor, "samples groups"]:
        """Return the standard deviation of each sample's token at each position of the groups."""
        c, a = self.channels, self.anatomy
        still = centred(self.positions) + self.constant * c.scale
        if bins.places is None:
            still = still[torch.randint(a.patches, (len(self.waves),), generator=self.generator)]
            square = (self.waves @ c.data.T + still).square().sum(1, keepdim=True)
        else:
            still = still[bins.places]
            square = self.waves.square().sum(1, keepdim=True) + still.square().sum(1)
            square = square + 2 * self.waves @ (still @ c.data).T
        return (square / a.width).sqrt()

    def _read_out(self) -> None:
        """Let the head read `signal` by class: of an average, or of what attention makes of it.

        Attention spreads the gradient of a class token over all tokens, or turns it to one.
        """
        a, c = self.anatomy, self.channels
        block = a.blocks[-1]
        told = c.signal + _BRIGHT * c.data[:, 0]  # brightness: what tells images apart
        if self.turned:
            self._turn(self.bins[0], block, self.read)
        elif not self.averaged:
            for name in (*block.qkv, *block.qkv_bias):
                self._set(name, 0.0)
            value = self.state[block.qkv[-1]]
            first = len(value) - len(value) // 3 if len(block.qkv) == 1 else 0
            value[first] = told
            self.state[f"{block.proj}.weight"][:, 0] = told = c.out
        worth = class_worth(a.classes)
        for head in linear_heads(self.model, a):
            weight = self.state[f"{head}.weight"].zero_()
            if weight.shape[1] < a.width:
                raise NotApplicable(f"{head} does not read a token, but {weight.shape[1]} numbers")
            if self.bins[0].kind != "head":  # of 0 its gradients have a known size
                weight[:, : a.width] = self.mild * worth[:, None] * told  # what is pooled first
            self._set(f"{head}.bias", 0.0)

    def _turn(self, bins: Bins, block: Block, length: float) -> float:
        """Let attention give the token of the position that the bins see, as long as `length`."""
        assert self.gates is not None and bins.places is not None
        c, at = self.channels, int(bins.places[0])
        gate = self.gates.rows[at]
        offset = gate @ (self.constant * c.scale) + self.gates.own[at] - 0.5
        row = (gate - offset / self.constant * c.scale) / (0.5 - _BESIDE)
        if self.attention:  # the class token is no 0: nothing of it in its key
            row = row - (row @ self.prefix) / (self.prefix @ c.sink) * c.sink
        turn_to(self.state, block, row, float(self._sizes(bins).median()), length)
        return length


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


def positions_of(state: Mapping[str, Tensor], anatomy: Anatomy) -> tuple[Tensor, Tensor]:
    """Return the position embedding of patches and of prefix tokens in float64; zeros without."""
    if anatomy.positions is None:
        none = torch.zeros(anatomy.tokens, anatomy.width, dtype=torch.float64)
        return none[anatomy.prefix_tokens :], none[:0]
    rows = state[anatomy.positions][0].detach().cpu().double()
    prefix = anatomy.position_prefix
    if len(rows) - prefix != anatomy.patches:
        raise NotApplicable("positions are resampled in the forward pass")
    return rows[prefix:], rows[:prefix]


def _alike(one: Bins, other: Bins) -> bool:
    """Whether two layers see the same positions."""
    if one.places is None or other.places is None:
        return one.places is other.places
    return torch.equal(one.places, other.places)


def centred(positions: Tensor) -> Tensor:
    return positions - positions.mean(1, keepdim=True)


def _apart(positions: Tensor, size: float) -> float:
    """Return half the smallest distance of two positions, `size` where some are the same."""
    least = float(torch.pdist(positions).min()) / 2 if len(positions) > 1 else 0.0
    return least if least > 1e-3 * size else size


def class_worth(classes: int) -> Float[Tensor, " classes"]:
    """Return what the head makes of `signal`: between 1 and 2 in size, another for each class."""
    steps = torch.arange(classes, dtype=torch.float64)
    return (1 + steps.div(2, rounding_mode="floor") / max(classes / 2, 1)) * (1 - 2 * (steps % 2))
