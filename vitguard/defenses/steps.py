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

from vitguard.defenses.base import Installed
from vitguard.errors import Incompatible, Unprotected
from vitguard.joining import frozen_by_peft

__all__ = ["given_for", "gradient_left", "remember", "watch_steps"]

_WATCHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_GIVEN: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[nn.Module], dict[str, int]]] = (
    weakref.WeakKeyDictionary()
)
"""The optimizers that were prepared, each with its model and the ids of what it steps, by name."""
_HOOKS: list[Any] = []


def watch_steps(piece: nn.Module, model: nn.Module) -> None:
    """From now on check each optimizer step of `model`; `piece.stepped()` is called for each.

    `piece.moving(model)` is called before, and also where the optimizer holds only some of what is
    trained. Both are called once more afterwards, since a closure makes the gradient inside the
    step: `stepped` counts a forward once, whatever steps on it (several optimizers, or one around
    another).

    Args:
        piece: What a defense left on the model, with the parameters that must be trained too.
    """
    _hook_steps()
    known = _WATCHED.get(piece)
    if known is None or known() is not model:
        _WATCHED[piece] = weakref.ref(model)


def remember(optimizer: Any, model: nn.Module) -> None:
    """Check from now on that the parameters of `model` that a prepared optimizer steps stay its.

    Raises:
        Incompatible: One that it stepped since an earlier call was replaced meanwhile.
    """
    _hook_steps()
    _refuse_replaced(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {n: id(p) for n, p in model.named_parameters() if id(p) in held}
    while optimizer is not None:  # accelerate has one of its own around torch's
        _GIVEN[optimizer] = weakref.ref(model), names
        optimizer = getattr(optimizer, "optimizer", None)


def given_for(model: nn.Module) -> list[Any]:
    """Return the optimizers that were prepared for a model and are still there."""
    return [optimizer for optimizer, (known, _) in _GIVEN.items() if known() is model]


def _hook_steps() -> None:
    if not _HOOKS:  # once a process, and only when something is protected
        _HOOKS.append(register_optimizer_step_pre_hook(_before_step))
        _HOOKS.append(register_optimizer_step_post_hook(_after_step))


def _refuse_replaced(optimizer: torch.optim.Optimizer) -> None:
    """Raise Incompatible where a prepared optimizer would step what is no longer the model's."""
    known, names = _GIVEN.get(optimizer, (lambda: None, {}))
    model = known()
    if model is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = {
        id(p) for other in given_for(model) for group in other.param_groups for p in group["params"]
    }
    now = dict(model.named_parameters())
    for name, old in names.items():
        new = now.get(name)  # the old one lives, and keeps its id, while the optimizer holds it
        if new is not None and new.requires_grad and id(new) not in others and old in held:
            raise Incompatible(
                f"Expected the parameters that the model had when the optimizer was prepared, got "
                f"another {name} in its place, which this step would not train (a new head, "
                "load_state_dict with assign=True, FSDP). Build the optimizer after that, and call "
                "guard.prepare with it."
            )


def gradient_left(piece: nn.Module) -> bool:
    """Whether a parameter of the model that a piece watches still holds a gradient."""
    reference = _WATCHED.get(piece)
    model = None if reference is None else reference()
    grads = () if model is None else (p.grad for p in model.parameters())
    return any(g is not None and bool(g.any()) for g in grads)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _refuse_replaced(optimizer)
    for piece, model, held in _stepped_by(optimizer):
        _check(piece, model, held)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for piece, model, held in _stepped_by(optimizer):
        added = _added(piece)
        if _holds(held, _base(piece, model)) or _holds(held, added):
            piece.moving(model)
            if all(i in held for i in added):
                piece.stepped()


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
    frozen = {id(p) for p in frozen_by_peft(model)} if _used(piece) else set()
    if any(id(p) in frozen for p in piece.parameters()):
        raise _left_out(piece, "one of a PEFT model that froze it")
    added, base = _added(piece), _base(piece, model)
    if not _holds(held, added) and not _holds(held, base):
        return  # an optimizer of something else
    piece.moving(model)
    if all(i in held for i in added):
        piece.stepped()
    elif not _used(piece):
        return
    elif all(i in held for i in base) or (
        piece.left_out({*added} & held, len(added)) and not _given_another(model, added)
    ):
        raise _left_out(piece, "one that was built without it")


def _used(piece: Any) -> bool:
    return not isinstance(piece, Installed) or piece.used()


def _given_another(model: nn.Module, added: list[int]) -> bool:
    """Whether an optimizer that was prepared beside this one has what was added."""
    held = (
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        for optimizer in given_for(model)
    )
    return any(i in ids for ids in held for i in added)


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
