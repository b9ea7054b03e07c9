"""Crafted weights to look at: as published, and by an adversary that knows the detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.discovery import discover
from vitguard.threats.crafts import Craft
from vitguard.vit import Anatomy, Block, logits_of

__all__ = ["adaptive", "published", "tokens_told_apart"]

Weights = dict[str, Tensor]


def published() -> Iterator[tuple[str, Callable[[nn.Module], Weights]]]:
    """Yield every craft of the package with its defaults, and plain ones as the papers write them.

    Raises:
        NotApplicable: By a craft, of an architecture that leaves it no place.
    """
    for name, kind in discover("vitguard.threats.crafts", Craft).items():
        yield name, kind().weights
    yield "plain imprint", lambda model: adaptive(model)
    yield "plain imprint, last block but one", lambda model: adaptive(model, block=-2)
    yield "class fishing (2202.00580)", fishing
    yield "suppression (2111.07380)", suppression


def fishing(model: nn.Module, target: int = 0) -> Weights:
    """One class alone has a gradient: all others are certain."""
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    inside = [n for n in weights if n.startswith(f"{Anatomy.of(model).head[0]}.")]  # maybe a stack
    weight, bias = (next(n for n in inside if n.endswith(kind)) for kind in ("weight", "bias"))
    weights[weight].zero_()[target] = 0.5
    weights[bias].fill_(1000.0)[target] = 0.0
    return weights


def suppression(model: nn.Module) -> Weights:
    """Hidden units that nothing sets off."""
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for block in Anatomy.of(model).blocks:
        rows = weights[f"{block.fc1}.weight"]
        weights[f"{block.fc1}.bias"].copy_(-10 * rows.norm(dim=1))
    return weights


def adaptive(
    model: nn.Module,
    *,
    block: int = 0,
    share: float = 1.0,
    directions: int = 1,
    noise: float = 0.0,
    steepness: float = 50.0,
    mute: float = 0.0,
    output: float = 1e-3,
    varied: bool = False,
    jitter: float = 0.0,
    norm: float = 1.0,
    public: Tensor | None = None,
    seed: int = 0,
) -> Weights:
    """Write a plain imprint, as mild as asked for.

    Args:
        share: Of the hidden units that are bins; the others stay honest.
        directions: Measuring directions that take turns.
        noise: On each row, relative to its length.
        steepness: Length of the rows.
        mute: What is left of the attention's projection.
        output: Size of the columns of fc2, which are equal.
        varied: Whether these columns have another length and sign each, as the server knows.
        jitter: Of the thresholds, in bins.
        norm: Factor on the scale of the norm before the layer, for all rows of it.
        public: Images of the server's own, whose tokens give the quantiles; normal ones without.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    parts = Anatomy.of(model).blocks[block]
    for name in (f"{parts.proj}.weight", f"{parts.proj}.bias"):
        weights[name] *= mute
    weights[f"{parts.norm2}.weight"] *= norm
    rows, bias = weights[f"{parts.fc1}.weight"], weights[f"{parts.fc1}.bias"]
    count, width = rows.shape
    bins = max(2, int(share * count))
    lines = torch.randn(directions, width, generator=generator)
    lines = F.normalize(lines - lines.mean(1, keepdim=True), dim=1)
    at = torch.arange(bins)
    each = (bins + directions - 1) // directions
    levels = (
        at // directions + 0.5 + jitter * (torch.rand(bins, generator=generator) - 0.5)
    ) / each
    cuts = torch.distributions.Normal(0.0, 1.0).icdf(levels.clamp(0.002, 0.998))
    if public is not None:
        measured = _normed(model, weights, parts, public) @ lines.T
        cuts = torch.stack(
            [
                torch.quantile(measured[:, k % directions], levels[k].clamp(0, 1))
                for k in range(bins)
            ]
        )
    loud = torch.randn(bins, width, generator=generator) * noise / width**0.5
    # units in any order: the server knows it
    where = torch.randperm(count, generator=generator)[:bins]
    written = steepness * F.normalize(lines[at % directions] + loud, dim=1)
    scale, shift = (weights[f"{parts.norm2}.{n}"].clamp_min(-9e9) for n in ("weight", "bias"))
    safe = torch.where(scale.abs() < 0.05, torch.full_like(scale, 0.05), scale)
    rows[where] = written / safe
    bias[where] = -steepness * cuts - (written / safe) @ shift
    columns = weights[f"{parts.fc2}.weight"]
    line = F.normalize(torch.randn(len(columns), generator=generator), dim=0)
    lengths = torch.full((bins,), output)
    if varied:
        signs = torch.randint(0, 2, (bins,), generator=generator) * 2.0 - 1
        lengths = lengths * signs * (0.5 + torch.rand(bins, generator=generator))
    columns[:, where] = line[:, None] * lengths
    return weights


def _normed(model: nn.Module, weights: Weights, parts: Block, images: Tensor) -> Tensor:
    """Return what enters fc1 of a block before scale and shift of its norm, (tokens, width)."""
    caught: list[Tensor] = []
    norm = model.get_submodule(parts.norm2)
    handle = norm.register_forward_hook(lambda module, args, out: caught.append(args[0]))
    try:
        with torch.no_grad():
            torch.func.functional_call(model, weights, (images,))
    finally:
        handle.remove()
    return F.layer_norm(caught[0], caught[0].shape[-1:]).flatten(0, 1)


def tokens_told_apart(
    model: nn.Module, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor, block: int = 0
) -> float:
    """Return the share of patch tokens that differences of two rows' gradients give, in [0, 1].

    The adversary knows which rows are neighbours; a token counts where a difference, scaled by that
    of the biases' gradients, is it up to a tenth of its length.
    """
    anatomy = Anatomy.of(model)
    parts = anatomy.blocks[block]
    own = {n: t.detach().clone() for n, t in model.state_dict().items()}
    model.load_state_dict(dict(weights))
    caught: list[Tensor] = []
    layer = model.get_submodule(parts.fc1)
    handle = layer.register_forward_hook(lambda module, args, out: caught.append(args[0].detach()))
    try:
        loss = F.cross_entropy(logits_of(model(images)), labels)
        wanted = [layer.weight, layer.bias]
        by_row, by_bias = torch.autograd.grad(loss, wanted)
    finally:
        handle.remove()
    tokens = caught[0][:, anatomy.prefix_tokens :].reshape(-1, by_row.shape[1]).double()
    fc2 = model.get_parameter(f"{parts.fc2}.weight").detach()
    rows, thresholds = _measured(model, parts)
    line = torch.linalg.svd(F.normalize(fc2, dim=0), full_matrices=False).U[:, 0]
    factor = (line @ fc2).double()  # of each unit's column, which the server wrote
    by_row, by_bias = by_row.double() / factor[:, None], by_bias.double() / factor
    pairs = _neighbours(rows, thresholds)
    numerator = by_row[pairs[:, 0]] - by_row[pairs[:, 1]]
    denominator = by_bias[pairs[:, 0]] - by_bias[pairs[:, 1]]
    found = (
        numerator
        / torch.where(denominator == 0, torch.ones_like(denominator), denominator)[:, None]
    )
    model.load_state_dict(own)
    distance = torch.cdist(tokens, found)
    return float((distance.min(1).values < 0.1 * tokens.norm(dim=1)).double().mean())


def _measured(model: nn.Module, parts: Block) -> tuple[Tensor, Tensor]:
    state = model.state_dict()
    scale = state[f"{parts.norm2}.weight"]
    shift = state[f"{parts.norm2}.bias"]
    rows, bias = state[f"{parts.fc1}.weight"], state[f"{parts.fc1}.bias"]
    directions = (rows * scale).double()
    lengths = directions.norm(dim=1)
    return F.normalize(directions, dim=1), (bias + rows @ shift).double() / lengths


def _neighbours(rows: Tensor, thresholds: Tensor) -> Tensor:
    """Return pairs: each row with those of its direction whose threshold is next."""
    alike = rows @ rows.T
    gaps = (thresholds[:, None] - thresholds[None]).abs()
    gaps = torch.where(alike > 0.5, gaps, torch.full_like(gaps, torch.inf))
    gaps.fill_diagonal_(torch.inf)
    next_ = gaps.topk(min(4, len(gaps) - 1), largest=False).indices
    first = torch.arange(len(rows))[:, None].expand_as(next_)
    return torch.stack([first.flatten(), next_.flatten()], 1)
