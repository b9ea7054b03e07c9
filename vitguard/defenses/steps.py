"""Watching optimizers: none may step a protected model and leave out what a defense added."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vitguard.errors import Unprotected
from vitguard.joining import frozen_by_peft

__all__ = ["watch_steps"]

_WATCHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_HOOKS: list[Any] = []


def watch_steps(piece: nn.Module, model: nn.Module) -> None:
    """From now on check each optimizer step of `model`; `piece.stepped()` is called for each.

    `piece.moving(model)` is called before, and also where the optimizer holds only some of what is trained.

    Args:
        piece: What a defense left on the model, with the parameters that must be trained too.
    """
    if not _HOOKS:  # once a process, and only when something is protected
        _HOOKS.append(register_optimizer_step_pre_hook(_before_step))
    known = _WATCHED.get(piece)
    if known is None or known() is not model:
        _WATCHED[piece] = weakref.ref(model)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _WATCHED:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for piece, reference in list(_WATCHED.items()):
        model = reference()
        if model is None or not any(m is piece for m in model.modules()):
            _WATCHED.pop(piece, None)  # the model is gone, or remove() was called
            continue
        _check(piece, model, held)


def _check(piece: Any, model: nn.Module, held: set[int]) -> None:
    frozen = {id(p) for p in frozen_by_peft(model)}
    if any(id(p) in frozen for p in piece.parameters()):
        raise _left_out(piece, "one of a PEFT model that froze it")
    added = [id(p) for p in piece.parameters() if p.requires_grad]
    known = set(added)
    base = [id(p) for p in model.parameters() if p.requires_grad and id(p) not in known]
    if not any(i in held for i in (*base, *added)):
        return  # an optimizer of something else
    piece.moving(model)
    if all(i in held for i in added):
        piece.stepped()
    elif all(i in held for i in base) or piece.left_out():
        raise _left_out(piece, "one that was built without it")


def _left_out(piece: nn.Module, got: str) -> Unprotected:
    return Unprotected(
        "Expected an optimizer that trains what the defense added to the model "
        f"({', '.join(n for n, _ in piece.named_parameters())}), got {got}. Call "
        "guard.prepare(optimizer)."
    )
