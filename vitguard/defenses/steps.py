"""Watching optimizers: none may step a protected model and leave out what a defense added."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from vitguard.errors import Unprotected
from vitguard.joining import frozen_by_peft

__all__ = ["watch_steps"]

_WATCHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_HOOKS: list[Any] = []


def watch_steps(piece: nn.Module, model: nn.Module) -> None:
    """From now on check each optimizer step of `model`; `piece.stepped()` is called for each.

    `piece.moving(model)` is called before, and also where the optimizer holds only some of what is
    trained. It is called once more afterwards, since a closure makes the gradient inside the step.

    Args:
        piece: What a defense left on the model, with the parameters that must be trained too.
    """
    if not _HOOKS:  # once a process, and only when something is protected
        _HOOKS.append(register_optimizer_step_pre_hook(_before_step))
        _HOOKS.append(register_optimizer_step_post_hook(_after_step))
    known = _WATCHED.get(piece)
    if known is None or known() is not model:
        _WATCHED[piece] = weakref.ref(model)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for piece, model, held in _stepped_by(optimizer):
        _check(piece, model, held)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for piece, model, held in _stepped_by(optimizer):
        if _holds(held, _base(piece, model)) or _holds(held, _added(piece)):
            piece.moving(model)


def _stepped_by(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, nn.Module, set[int]]]:
    """Yield each piece that is watched, its model, and by id what the optimizer holds."""
    if not _WATCHED:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for piece, reference in list(_WATCHED.items()):
        model = reference()
        if model is None or not any(m is piece for m in model.modules()):
            _WATCHED.pop(piece, None)  # the model is gone, or remove() was called
            continue
        yield piece, model, held


def _check(piece: Any, model: nn.Module, held: set[int]) -> None:
    frozen = {id(p) for p in frozen_by_peft(model)}
    if any(id(p) in frozen for p in piece.parameters()):
        raise _left_out(piece, "one of a PEFT model that froze it")
    added, base = _added(piece), _base(piece, model)
    if not _holds(held, added) and not _holds(held, base):
        return  # an optimizer of something else
    piece.moving(model)
    if all(i in held for i in added):
        piece.stepped()
    elif all(i in held for i in base) or piece.left_out():
        raise _left_out(piece, "one that was built without it")


def _added(piece: nn.Module) -> list[int]:
    return [id(p) for p in piece.parameters() if p.requires_grad]


def _base(piece: nn.Module, model: nn.Module) -> list[int]:
    known = set(_added(piece))
    return [id(p) for p in model.parameters() if p.requires_grad and id(p) not in known]


def _holds(held: set[int], ids: list[int]) -> bool:
    return any(i in held for i in ids)


def _left_out(piece: nn.Module, got: str) -> Unprotected:
    return Unprotected(
        "Expected an optimizer that trains what the defense added to the model "
        f"({', '.join(n for n, _ in piece.named_parameters())}), got {got}. Call "
        "guard.prepare(optimizer)."
    )
