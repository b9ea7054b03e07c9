"""What an update passes before it leaves the client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitguard import wrapping
from vitguard.core import Batch, Update
from vitguard.defenses.base import Ledgered, UpdateDefense, traits_of
from vitguard.defenses.gate import LeakGate, Tried
from vitguard.defenses.protection import Protection
from vitguard.errors import Unprotected, expected
from vitguard.guard.public import extras_of, public_copy
from vitguard.self_attack import attack_own
from vitguard.tensor_files import check_plain
from vitguard.vit import canonical_name, canonical_parameters

__all__ = ["floating_buffers", "names_by_values", "require_released", "require_sent", "sealed"]


def require_sent(protection: Protection) -> None:
    """Raise Unprotected where the training said that nothing leaves this machine."""
    if protection.destination == "local":
        raise Unprotected(
            "Expected no update to leave, as guard.keep_local() said, got one. Leave that call "
            "out where updates are sent."
        )


def require_released(protection: Protection, update: Update) -> None:
    """Raise Unprotected if an update says something that no private step released."""
    step = protection.step
    if protection.exposed:
        raise Unprotected(
            "Expected gradients of the private loop only, got a plain one (of a pass in eval "
            "mode, or around the model's own forward) between protect and prepare. Load the "
            "weights from before it, then train on what prepare returned."
        )
    if not isinstance(step, Ledgered) or not isinstance(update, Update):
        return
    counted = protection.ledgers[step.name].steps - protection.begun
    if counted <= 0 and any(bool(t.any()) for t in update.tensors.values()):
        since = (
            " since will_seal (in Flower attach) was called, which goes before training"
            if protection.begun
            else ""
        )
        raise Unprotected(
            f"Expected an update that private steps made, got one while the ledger of "
            f"{step.name} counts none{since}. Train on the optimizer and loader that prepare "
            "returned; after a restart call guard.load_state_dict with what the guard saved."
        )
    step.require_covered(protection.ledgers[step.name])


def sealed(
    model: nn.Module,
    protection: Protection,
    update: Update,
    batch: Batch | None,
    *,
    trained: bool = False,
) -> Update:
    """Return an update after every defense of the update, and past the gate.

    Args:
        batch: What is behind it, for a gate.
        trained: Whether training made it, which may have moved the model.
    """
    if not isinstance(update, Update):
        raise expected(
            "an Update", type(update).__name__,
            "Wrap the tensors: vg.Update(tensors, kind='difference', batch_size=8).",
        )  # fmt: skip
    tensors = {
        canonical_name(name): wrapping.gathered(t.detach()) for name, t in update.tensors.items()
    }
    twins = names_by_values(model)
    if strangers := sorted(tensors.keys() - twins.keys()):
        raise expected(
            "an update by the model's parameter names", strangers[0],
            "A name that no defense knows would leave unprotected.",
        )  # fmt: skip
    for name, tensor in tensors.items():
        check_plain(name, tensor, "the update")
    _check_tensors(model, tensors, update)
    made = update = replace(update, tensors=tensors)
    held: dict[str, str] = {}
    for piece in protection.installed():
        piece.releasing(model)
        for name in tensors:
            if reason := next((r for n in twins[name] if (r := piece.holds(n)) is not None), None):
                held[name] = reason
    acting = [d for d in protection.defenses if isinstance(d, UpdateDefense)]
    frozen = _frozen(model, tensors)
    left_out = {n for d in acting for n in d.leaves_out(frozen)}
    if moved := next((n for n in frozen if n in left_out and bool(tensors[n].any())), None):
        raise expected(
            f"no change of {moved}, which is frozen", "one",
            "Unfreeze it before seal: what was trained must be protected.",
        )  # fmt: skip
    reason = "frozen, so that there is nothing to send"
    held |= {n: reason for n in frozen if n in left_out}
    update = update.seal(held)
    anatomy = protection.anatomy.with_head_of(model)
    with protection.feedback.around() as passage:
        for defense in acting:  # one by one: if the next refuses, what it says tells of this one
            with protection.counted([defense]):
                if batch is not None:
                    defense.look(update, batch.images, anatomy)
                if not defense.feeds_back():
                    if not trained:
                        update = _completed(model, protection, defense, update, twins)
                    update = defense.seal(update, anatomy, protection.draws)
                    continue
                whole = passage.fed(defense, update)
                update = defense.seal(whole, anatomy, protection.draws)
                passage.keep(defense, whole, update)
        for name in update.sealed:
            if shown := next((n for n in twins.get(name, ()) if update.can_read(n)), None):
                raise Unprotected(
                    f"Expected {shown} to be sealed with {name}, with which it shares its values, "
                    "got it readable. Select both, or untie them."
                )
        return _past_gate(model, protection, update, batch, made if trained else None)


def names_by_values(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each name in the state dict, all names of the same values: tied ones have some.

    What a name hides another one of them would show.
    """
    found: dict[Any, list[str]] = {}
    for name, tensor in model.state_dict().items():
        whole = isinstance(tensor, Tensor) and not tensor.is_meta and tensor.numel()
        place = (tensor.data_ptr(), tensor.shape) if whole else name
        found.setdefault(place, []).append(canonical_name(name))
    return {name: names for names in found.values() for name in names}


def floating_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of floating point in the state dict, by the base model's names."""
    own = {name for name, _ in model.named_buffers()}
    return {
        canonical_name(n): t
        for n, t in model.state_dict().items()
        if n in own and t.is_floating_point() and not n.startswith("vitguard.")
    }


def _completed(
    model: nn.Module,
    protection: Protection,
    defense: UpdateDefense,
    update: Update,
    twins: Mapping[str, list[str]],
) -> Update:
    """Return the update with all that a manifest has room for.

    An update that `Guard.update` made is of parameters alone, and has a tied one once: its other
    names have the same change, and buffers have none.
    """
    lacking = {*defense.awaits()} - {*update.tensors, *update.sealed}
    if not lacking:
        return update
    tensors = dict(update.tensors)
    buffers = floating_buffers(model)
    for name in sorted(lacking):
        twin = next((n for n in twins.get(name, ()) if n in update.tensors), None)
        if twin is not None:
            tensors[name] = update.tensors[twin]
        elif name in buffers and not protection.holds(name):
            tensors[name] = torch.zeros_like(buffers[name])
    return replace(update, tensors=tensors)


def _check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], update: Update) -> None:
    """Raise InputError unless tensors come as the model has them, before a ledger counts."""
    if not tensors and not update.sealed:
        raise expected(
            "an update with tensors of the model", "none",
            "Give the difference of each parameter, by its name.",
        )  # fmt: skip
    for named, own in (*model.named_parameters(), *model.named_buffers()):
        name = canonical_name(named)
        given = tensors.get(name, own)
        if own.shape != given.shape:
            raise expected(
                f"{name} of shape {tuple(own.shape)}", tuple(given.shape),
                "Send each tensor as the model has it.",
            )  # fmt: skip
        if own.is_floating_point() and not given.is_floating_point():
            raise expected(
                f"{name} as floating-point numbers, as the model has it", given.dtype,
                "Whole numbers would leave as they are: seal first, then round.",
            )  # fmt: skip


def _frozen(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the frozen parameters in a difference of whole state dicts; they are public."""
    named = model.named_parameters(remove_duplicate=False)
    weights = {canonical_name(n): p for n, p in named}
    return [n for n in tensors if n in weights and not weights[n].requires_grad]


def _past_gate(
    model: nn.Module,
    protection: Protection,
    update: Update,
    batch: Batch | None,
    trained: Update | None,
) -> Update:
    """Return what may leave; refused where a gate is to look and has no images to look with.

    `trained` is what the training made, if it may have moved the model: the adversary knows the
    weights before it, so these are looked from as well.
    """
    gate = next((d for d in protection.defenses if isinstance(d, LeakGate)), None)
    if gate is None or protection.ungating:
        return update
    if not gate.due(protection.tally):
        gate.skip(protection.tally)
        return update
    if batch is None or len(batch.images) != update.batch_size:
        raise Unprotected(
            f"Expected the {update.batch_size} images behind the update for the gate, got "
            f"{0 if batch is None else len(batch.images)}. Call guard.seal(update, "
            "batch=(images, labels))."
        )
    models = [public_copy(model)]
    if trained is not None and trained.kind == "difference":
        models.append(_taken_back(public_copy(model), trained))

    defenses, extras = protection.defenses, extras_of(protection)
    traits = traits_of(defenses, protection.anatomy.with_head_of(model))

    def attack(seen: Update) -> list[Tried]:
        return [
            tried
            for before in models
            for tried in attack_own(
                before, seen, batch, defenses=defenses, traits=traits, extras=extras,
                work=gate.work / len(models),
            )
        ]  # fmt: skip

    return gate.passage(update, attack, protection.tally)


def _taken_back(model: nn.Module, update: Update) -> nn.Module:
    """Return the model with a difference subtracted, in place."""
    with torch.no_grad():
        for name, p in canonical_parameters(model).items():
            if name in update.tensors:
                p -= update.tensors[name].to(p)
    return model
