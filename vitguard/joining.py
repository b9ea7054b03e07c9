"""Bringing an optimizer that exists already up to a model that defenses have changed.

What they added joins, what they took out leaves. No group is added or dropped: schedulers hold a
rate for each group that they saw, and break or pass over a new one in silence; `LBFGS` knows only
its first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["drop", "join"]


def join(
    optimizer: torch.optim.Optimizer,
    added: Mapping[str, nn.Parameter],
    model: nn.Module,
    anatomy: Anatomy,
) -> None:
    """Put each of `added`, by name, into the group of the parameter of the model most like it.

    An embedding goes to the positions, or what stands in for them, a head's weight or bias to those
    of the classification head: with them it shares rate, layer decay and weight decay.

    Raises:
        InputError: The optimizer made its state when it was built, so that nothing can join it.
    """
    if isinstance(optimizer, torch.optim.Adagrad):
        raise expected(
            f"an optimizer that takes in {', '.join(added)}",
            "Adagrad, which makes its state when it is built",
            "Build it after protect, of model.parameters().",
        )
    own = {k: p for k, p in model.named_parameters() if k not in added}
    for name, parameter in added.items():
        group = _group_of(optimizer, _alike(name, own, anatomy), own)
        group["params"].append(parameter)  # in place: LBFGS keeps this very list
        if isinstance(group.get("param_names"), list):
            group["param_names"].append(name)
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer._numel_cache = None


def drop(optimizer: torch.optim.Optimizer, gone: Iterable[nn.Parameter]) -> None:
    """Take parameters that are no longer the model's out of their groups, which stay."""
    strangers = {id(p) for p in gone}
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in strangers]
        if len(kept) < len(group["params"]):
            for key in ("params", "param_names"):
                if isinstance(group.get(key), list):
                    group[key][:] = [group[key][i] for i in kept]  # in place, as in `join`
    for parameter in [p for p in optimizer.state if id(p) in strangers]:
        del optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer._numel_cache = None


def _alike(name: str, own: Mapping[str, nn.Parameter], anatomy: Anatomy) -> list[str]:
    """Return the model's parameters whose group fits, the best first."""
    if ".head." in name:
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
