"""protect(): folds defenses around a model and one local step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from vitguard import wrapping
from vitguard.analysis import refuse_given_away, refuse_idle
from vitguard.defenses.base import (
    BatchDefense,
    Defense,
    Draws,
    ModelDefense,
    StepDefense,
    UpdateDefense,
)
from vitguard.defenses.gate import LeakGate
from vitguard.defenses.protection import Protection
from vitguard.errors import Incompatible, expected
from vitguard.guard.handle import Guard
from vitguard.registry import parse_stack
from vitguard.vit import Anatomy

__all__ = ["Stack", "protect", "stack_of"]

Stack = Iterable[Defense] | Defense | str
"""Defenses that act together: several, a single one, or a spec for `parse_stack`."""

_PLACES = (ModelDefense, BatchDefense, StepDefense, UpdateDefense, LeakGate)


def stack_of(defenses: Stack) -> list[Defense]:
    """Return the defenses that a stack in any of its three forms means.

    Raises:
        InputError: Something else, such as a class in place of an instance, or a wrong spec.
    """
    if isinstance(defenses, str):
        return parse_stack(defenses)
    stack = list(defenses) if isinstance(defenses, Iterable) else [defenses]
    strangers = [d for d in stack if not isinstance(d, _PLACES)]
    if strangers:
        raise expected(
            "defenses",
            repr(strangers[0]),
            "A stack is a list such as [vg.FixedPositions('frozen')] or a spec such as "
            "'positions:kind=frozen'; audit takes several as {name: stack}.",
        )
    return stack


def protect(
    model: nn.Module,
    defenses: Stack,
    *,
    anatomy: Anatomy | None = None,
    generator: torch.Generator | None = None,
) -> Guard:
    """Fold defenses around a model, in place.

    Args:
        model: A Vision Transformer that `Anatomy` recognises, not yet compiled or distributed. Of
            a PEFT model the one inside it is protected.
        defenses: What to apply: a list, a single defense, or a spec such as
            `"positions:kind=frozen+shuffle"`. The place fixes the order (model, batch, step,
            update); inside a place the list does.
        anatomy: Names and sizes of a model that is not recognised.
        generator: Source of every draw, for tests and audits: a seed can be searched, so no
            guarantee holds then, and `privacy_spent` says so. By default every draw is fresh from
            the operating system.

    Raises:
        UnsupportedModel: No Vision Transformer was recognised.
        Incompatible: The defenses cannot work together or on this model; the model is unchanged.
        InputError: The model is wrapped or protected already, or something is no defense.
    """
    model = wrapping.bare(model)
    stack = stack_of(defenses)
    if anatomy is not None and not isinstance(anatomy, Anatomy):
        raise expected("an Anatomy", repr(anatomy))
    if generator is not None and not isinstance(generator, torch.Generator):
        raise expected(
            "generator as a torch.Generator", repr(generator),
            "Make one of a seed: torch.Generator().manual_seed(0).",
        )  # fmt: skip
    anatomy = anatomy or wrapping.anatomy_of(model)
    ordered = [d for place in _PLACES for d in stack if isinstance(d, place)]
    names = [d.name for d in ordered]
    if repeated := {n for n in names if names.count(n) > 1}:
        raise Incompatible(f"Expected each defense once, got {', '.join(sorted(repeated))} twice.")
    if sum(isinstance(d, StepDefense) for d in ordered) > 1:
        raise Incompatible("Expected at most one defense of the step, got two. Drop one.")
    if any(isinstance(d, ModelDefense) for d in ordered):
        wrapping.require_values(model)
    for defense in ordered:
        defense.check(model, anatomy, ordered)
    refuse_given_away(model, anatomy, ordered)
    refuse_idle(model, anatomy, ordered)
    draws = Draws(generator)
    protection = Protection(anatomy, tuple(ordered), draws)
    before = list(model.parameters())
    try:
        for defense in ordered:
            if isinstance(defense, ModelDefense):
                protection.add_module(defense.name, defense.install(model, anatomy, draws))
    except BaseException:
        protection.uninstall(model)
        raise
    left = {id(p) for p in model.parameters()}
    protection.taken = WeakIdKeyDictionary({p: None for p in before if id(p) not in left})
    model.add_module("vitguard", protection.train(model.training))
    if any(isinstance(d, StepDefense) for d in ordered):
        protection.watch_training(model)
    if any(isinstance(d, StepDefense | ModelDefense) for d in ordered):
        protection.watch_loading(model)
    protection.watch_sending(model)
    return Guard(model)
