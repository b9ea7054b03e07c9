"""What the weights alone show: parallel rows, ordered biases, muted branches, scaled rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vitguard.inspection.rows import finite, regularity, twin_cosines
from vitguard.inspection.signs import largest
from vitguard.inspection.verdict import Sign
from vitguard.vit import Anatomy

__all__ = ["structure_signs"]

Place = tuple[str, float]
_LEAST = 1e-6  # what is shorter counts as so long: a muted branch is no infinity


def structure_signs(
    weights: Mapping[str, Tensor],
    anatomy: Anatomy,
    generator: torch.Generator,
    numbers: bool = False,
) -> list[Sign]:
    """Return the signs of the weights by themselves.

    Args:
        weights: Tensors by the base model's name.
        anatomy: Which name has which role.
        generator: Draws the projection in which parallel rows are looked for.
        numbers: Whether it is known that all values are numbers.
    """
    weights = {n: t.detach() for n, t in weights.items() if t.is_floating_point()}
    broken = [(n, float(not (numbers or finite(t)))) for n, t in weights.items()]
    signs = largest("not finite", broken)
    if signs and signs[0].value:
        return signs  # nothing else can be computed
    with torch.no_grad():
        matrices = {n: t.float() for n, t in _matrices(weights, anatomy)}
        lengths = {n: t.norm(dim=1) for n, t in matrices.items()}
        own = {n: lengths[n] for n, t in matrices.items() if t is weights[n]}  # without LoRA
        scaled_norms, muted_norms = _norms(weights, anatomy)
        named = {
            "parallel rows": _parallel(matrices, lengths, generator),
            "ordered biases": _ordered(weights, lengths),
            "muted branch": _muted(weights, anatomy),
            "shut units": _shut(weights, anatomy),
            "scaled row": _scaled(weights, [*matrices, *_scoring(weights, anatomy)], own),
            "head bias": _head_bias(weights, anatomy),
            "scaled norm": scaled_norms,
            "muted norm": muted_norms,
        }
        return signs + [s for name, places in named.items() for s in largest(name, places)]


def _matrices(weights: Mapping[str, Tensor], anatomy: Anatomy) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight that reads tokens before a gate: fc1, and the first layer of an adapter.

    The second one (B of LoRA) reads few channels, most of them alike, and honest training of it
    makes rows that are parallel, or tiny beside others. Of LoRA beside fc1 it counts in the sum.
    Behind the blocks they are the hidden layers of a head, and of an MLP that pools.
    """
    known = {f"{m}.weight" for b in anatomy.blocks for m in (b.proj, b.fc2)}
    known |= {n for b in anatomy.blocks for n in b.qkv}
    blocks, hidden = tuple(f"{b.name}." for b in anatomy.blocks), _hidden(weights, anatomy)
    for name, tensor in weights.items():
        inside = name in hidden or name.startswith(blocks)
        if not inside or tensor.dim() != 2 or len(tensor) < 2 or name in known:
            continue
        if tensor.shape[1] == anatomy.width and ".lora_B." not in name:
            added = _added(name, weights)
            yield name, tensor if added is None else tensor + added


def _hidden(weights: Mapping[str, Tensor], anatomy: Anatomy) -> set[str]:
    """Return the matrices outside the blocks whose outputs another one beside them reads.

    In a head, or with more outputs than inputs or fewer: square ones elsewhere are of attention.
    """
    blocks = tuple(f"{b.name}." for b in anatomy.blocks)
    heads = tuple(f"{h}." for h in anatomy.head)
    matrices = [
        (n, t.shape)
        for n, t in weights.items()
        if t.dim() == 2 and n.endswith(".weight") and not n.startswith(blocks)
    ]
    found = set()
    # in any order: a server chooses that of what it sends
    for (name, (rows, columns)), (after, (_, reads)) in itertools.permutations(matrices, 2):
        in_head = name.startswith(heads) and after.startswith(heads)
        beside = in_head or _parent(name) == _parent(after)
        if rows == reads and beside and (rows != columns or after.startswith(heads)):
            found.add(name)
    return found


def _parent(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[0]


def _added(name: str, weights: Mapping[str, Tensor]) -> Tensor | None:
    """Return what LoRA adds to a weight, up to its scaling; None where there is none."""
    start = f"{name.removesuffix('weight')}lora_A."
    for down, first in weights.items():
        if down.startswith(start) and first.dim() == 2:
            second = weights.get(down.replace(".lora_A.", ".lora_B."))
            if second is not None:
                return second.to(first) @ first
    return None


def _parallel(
    matrices: Mapping[str, Tensor], lengths: Mapping[str, Tensor], generator: torch.Generator
) -> Iterator[Place]:
    for name, rows in matrices.items():
        yield name, float((twin_cosines(rows, lengths[name], generator) > 0.9).float().mean())


def _ordered(weights: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> Iterator[Place]:
    for name, sizes in lengths.items():
        bias = weights.get(f"{name.removesuffix('weight')}bias")
        if bias is not None and bias.shape == sizes.shape:
            yield (
                f"{name.removesuffix('weight')}bias",
                max(regularity(bias), regularity(bias / sizes.clamp_min(1e-12))),
            )


def _muted(weights: Mapping[str, Tensor], anatomy: Anatomy) -> Iterator[Place]:
    for block in anatomy.blocks:
        named = {
            f"{m}.weight": weights.get(f"{m}.weight") for m in (block.proj, block.fc1, block.fc2)
        }
        if block.qkv:  # of query, key and value the last moves the tokens
            values = weights.get(block.qkv[-1])
            if values is not None and len(block.qkv) == 1:
                values = values[len(values) // 3 * 2 :]
            named[block.qkv[-1]] = values
        for name, weight in named.items():
            if weight is not None and weight.dim() == 2:
                gain = float(weight.float().norm()) / len(weight) ** 0.5
                yield name, 1 / max(gain, _LEAST)


def _shut(weights: Mapping[str, Tensor], anatomy: Anatomy) -> Iterator[Place]:
    """Share of hidden units that normalised inputs set off at four standard deviations only."""
    for block in anatomy.blocks:
        parts = (f"{block.fc1}.weight", f"{block.fc1}.bias", f"{block.norm2}.weight")
        rows, bias, scale = (weights.get(n) for n in parts)
        if rows is None or bias is None or scale is None or scale.shape != rows.shape[1:]:
            continue
        shift = weights.get(f"{block.norm2}.bias", torch.zeros_like(scale))
        usual = bias.float() + rows.float() @ shift.float()
        spread = (rows.float() * scale.float()).norm(dim=1)
        yield parts[1], float((usual < -4 * spread).float().mean())


def _scaled(
    weights: Mapping[str, Tensor], names: list[str], lengths: Mapping[str, Tensor]
) -> Iterator[Place]:
    """Largest length of a row over the usual one, in the head and the gated layers."""
    for name in dict.fromkeys(names):
        sizes = lengths[name] if name in lengths else weights[name].float().norm(dim=1)
        most = float(sizes.max())
        if most:
            yield name, most / max(float(sizes.median()), _LEAST * most)


def _head_bias(weights: Mapping[str, Tensor], anatomy: Anatomy) -> Iterator[Place]:
    for head in _scoring(weights, anatomy):
        name = f"{head.removesuffix('weight')}bias"
        bias = weights.get(name)
        if bias is not None and bias.dim() == 1:
            yield name, float((bias.float() - bias.float().median()).abs().max())


def _scoring(weights: Mapping[str, Tensor], anatomy: Anatomy) -> list[str]:
    """Return the matrices that make the scores: the head, or the last layer of a stack in it."""
    heads, hidden = tuple(f"{h}." for h in anatomy.head), _hidden(weights, anatomy)
    return [
        n
        for n, t in weights.items()
        if n.startswith(heads) and n.endswith(".weight") and t.dim() == 2 and n not in hidden
    ]


def _norms(weights: Mapping[str, Tensor], anatomy: Anatomy) -> tuple[list[Place], list[Place]]:
    """Return the largest scale of each norm over the usual one, and how much smaller than one."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name.endswith(".weight") and tensor.dim() == 1 and anatomy.role(name) == "norm":
            found.setdefault(len(tensor), {})[name] = tensor.float().abs().cpu()
    scaled, muted = [], []
    for alike in found.values():
        scales = torch.stack([*alike.values()])
        most, usual = scales.amax(1), scales.median(1).values
        ratios = most / torch.maximum(usual, _LEAST * most)
        gains = scales.square().mean(1).sqrt().clamp_min(_LEAST)
        scaled += [(n, r) for n, r in zip(alike, ratios.tolist(), strict=True) if r == r]
        muted += zip(alike, (1 / gains).tolist(), strict=True)
    return scaled, muted
