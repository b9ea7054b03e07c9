"""Bringing an optimizer that exists already up to a model that defenses have changed.

What they added joins, what they took out leaves. No group is added or dropped: schedulers hold a
rate for each group that they saw, and break or pass over a new one in silence; `LBFGS` knows only
its first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["drop", "embeddings", "frozen_by_peft", "held_by", "join"]


def join(
    optimizer: torch.optim.Optimizer,
    added: Mapping[str, nn.Parameter],
    model: nn.Module,
    anatomy: Anatomy,
    others: Sequence[Any] = (),
) -> None:
    """Put each of `added`, by name, into the group of the parameter of the model most like it.

    An embedding goes to the positions, or what stands in for them, a head's weight or bias to those
    of the classification head: with them it shares rate, layer decay and weight decay. One that is
    in a group already moves, since the library that made the groups did not know it; not out of a
    group of added parameters alone, which somebody made for them, nor once it has been stepped.

    Args:
        others: Optimizers prepared before. Where one of them steps other parameters of the model
            and has an added one, that stays there, or moves where only `optimizer` has its like.

    Raises:
        InputError: The optimizer made its state when it was built, so that nothing can join it.
    """
    own = {k: p for k, p in model.named_parameters() if k not in added}
    added = _left_to(optimizer, added, own, anatomy, others)
    new = {name for name, p in added.items() if _holder(optimizer, p) is None}
    kind = type(optimizer).__name__
    if new and (isinstance(optimizer, torch.optim.Adagrad) or kind == "ZeroRedundancyOptimizer"):
        raise expected(
            f"an optimizer that takes in {', '.join(sorted(new))}",
            f"{kind}, which makes its state when it is built",
            "Build it after protect, of model.parameters().",
        )
    for name, parameter in added.items():
        group = _group_of(optimizer, _alike(name, own, anatomy), own)
        holder = _holder(optimizer, parameter)
        if holder is not None:
            ours = {id(p) for p in added.values()}
            alone = all(id(p) in ours for p in holder["params"])
            if alone or holder is group or parameter in optimizer.state:
                continue
            _leave(holder, {id(parameter)})
        group["params"].append(parameter)  # in place: LBFGS keeps this very list
        if isinstance(group.get("param_names"), list):
            group["param_names"].append(name)
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer._numel_cache = None


def _left_to(
    optimizer: torch.optim.Optimizer,
    added: Mapping[str, nn.Parameter],
    own: Mapping[str, nn.Parameter],
    anatomy: Anatomy,
    others: Sequence[Any],
) -> dict[str, nn.Parameter]:
    """Return what no other optimizer of the same model trains, one beside this one."""
    ours = {id(p) for p in own.values()}
    mine = held_by(optimizer) & ours
    left = dict(added)
    for other in others:
        theirs = held_by(other)
        if not theirs & ours or theirs & mine:  # one of an earlier round, or around this one
            continue
        for name, p in added.items():
            like = [id(own[n]) for n in _alike(name, own, anatomy) if n in own]
            here, there = (any(i in held for i in like) for held in (mine, theirs))
            if id(p) not in theirs or id(p) in held_by(optimizer):
                continue
            if here and not there and p not in other.state:
                drop(other, [p])
            else:
                left.pop(name, None)
    return left


def drop(optimizer: torch.optim.Optimizer, gone: Iterable[nn.Parameter]) -> None:
    """Take parameters that are no longer the model's out of their groups, which stay."""
    strangers = {id(p) for p in gone}
    for group in optimizer.param_groups:
        _leave(group, strangers)
    for parameter in [p for p in optimizer.state if id(p) in strangers]:
        del optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer._numel_cache = None


def held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return which parameters an optimizer steps, by id.

    Raises:
        InputError: It is no optimizer.
    """
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise expected(
            "an optimizer first", type(optimizer).__name__,
            "Call guard.prepare(optimizer), or guard.prepare(optimizer, loader).",
        )  # fmt: skip
    return {id(p) for group in groups for p in group["params"]}


def embeddings(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Return the names of the parameters that embed positions and tokens, added ones included."""
    names = {n for n, _ in model.named_parameters()}
    known = {n for n in (anatomy.positions, *anatomy.prefix) if n in names}
    return known | {n for n in names if n.startswith("vitguard.") and not _of_head(n)}


def frozen_by_peft(model: nn.Module) -> list[nn.Parameter]:
    """Return what defenses added to a model that has PEFT's layers, and PEFT froze."""
    layers = [m for m in model.modules() if type(m).__module__.startswith("peft.")]
    if not layers:
        return []
    kept = {id(p) for layer in layers for p in layer.parameters()}
    return [
        p for n, p in model.named_parameters()
        if n.startswith("vitguard.") and not p.requires_grad and id(p) not in kept
    ]  # fmt: skip


def _of_head(name: str) -> bool:
    return ".head." in name


def _holder(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any] | None:
    """Return the group that a parameter is in."""
    groups = optimizer.param_groups
    return next((g for g in groups if any(p is parameter for p in g["params"])), None)


def _leave(group: dict[str, Any], gone: set[int]) -> None:
    """Take parameters, by id, out of a group."""
    kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
    if len(kept) < len(group["params"]):
        for key in ("params", "param_names"):
            if isinstance(group.get(key), list):
                group[key][:] = [group[key][i] for i in kept]  # in place, as in `join`


def _alike(name: str, own: Mapping[str, nn.Parameter], anatomy: Anatomy) -> list[str]:
    """Return the model's parameters whose group fits, the best first."""
    if _of_head(name):
        ending = name.rpartition(".")[2]
        heads = tuple(f"{head}." for head in anatomy.head)
        return [k for k in own if k.startswith(heads) and k.endswith(f".{ending}")]
    return [
        *([anatomy.positions] if anatomy.positions else ()), *anatomy.prefix,
        anatomy.patch_bias, anatomy.patch_weight,
    ]  # fmt: skip


def _group_of(
    optimizer: torch.optim.Optimizer, names: list[str], own: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    for name in names:
        for group in optimizer.param_groups:
            if name in own and any(p is own[name] for p in group["params"]):
                return group
    return optimizer.param_groups[0]
