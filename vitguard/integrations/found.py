"""What the integrations share: the guard inside a trainer's model, its loss, state and refusals."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn

from vitguard.defenses.base import Ledgered, StepDefense
from vitguard.defenses.privacy.accounting import Ledger
from vitguard.defenses.privacy.loader import PoissonLoader
from vitguard.defenses.privacy.target import PrivacyTarget
from vitguard.defenses.protection import Protection
from vitguard.errors import Incompatible, InputError, Unprotected, expected
from vitguard.files import write_atomically
from vitguard.guard import Guard
from vitguard.guard.state import from_bytes, to_bytes

__all__ = [
    "EXTRAS_FILE", "STATE_FILE", "epsilons", "guard_inside", "holds_all", "is_private",
    "join_ledgers", "load_extras", "load_spent", "load_state", "refuse_accumulation",
    "refuse_compiled", "refuse_float16", "refuse_idle", "refuse_long_plan", "refuse_spread",
    "refuse_upload",
    "save_extras", "save_spent", "save_state", "spent_bytes", "take_counts", "take_state",
    "with_auxiliary",
]  # fmt: skip

STATE_FILE = "vitguard.json"
"""The guard's state in a checkpoint folder, readable by its owner alone."""

EXTRAS_FILE = "vitguard.safetensors"
"""What defenses added to the model, which the weights in a checkpoint folder may leave out."""


def guard_inside(model: nn.Module) -> Guard:
    """Return the guard of a protected model, or of the one that is a part of `model`.

    Raises:
        InputError: No part is protected, or several are.
    """
    owners = [m for m in model.modules() if isinstance(m._modules.get("vitguard"), Protection)]
    if len(owners) != 1:
        raise expected(
            "one protected model in the trainer", f"{len(owners)} in {type(model).__name__}",
            "Call vg.protect(model, defenses) before the trainer is made.",
        )  # fmt: skip
    return Guard.of(owners[0])


def refuse_idle(guard: Guard) -> None:
    """Raise Unprotected where defenses of the update would not act on a trainer's checkpoint."""
    if line := guard._protection.idle():
        raise Unprotected(line)


def refuse_upload(guard: Guard, got: str) -> None:
    """Raise Unprotected where an upload of the whole weights holds what a defense keeps local."""
    if guard.traits.positions == "withheld":
        raise Unprotected(
            f"Expected weights of which all may leave, got {got} with positions that stay on the "
            "client (withheld). Leave it out, and upload guard.public_model() after the training "
            "with what may be known in it."
        )


def refuse_accumulation(setting: str, steps: int) -> None:
    """Raise Incompatible where a trainer steps once in several batches: each is a release."""
    if steps != 1:
        raise Incompatible(
            f"Expected {setting}=1 under differential privacy, got {steps}. Make the loader's "
            "batch_size that much larger and set physical_batch to what fits the memory."
        )


def refuse_float16(setting: str, asked: bool, remedy: str) -> None:
    """Raise Incompatible where a trainer scales the loss for float16."""
    if asked:
        raise Incompatible(
            f"Expected bf16 or full precision under differential privacy, got {setting}: its "
            f"scaler would change what is clipped. {remedy}."
        )


def refuse_compiled(got: str, asked: bool, remedy: str) -> None:
    """Raise Incompatible where a trainer compiles the model: its layers cannot be watched then."""
    if asked:
        raise Incompatible(
            "Expected a model that is not compiled under differential privacy, got "
            f"{got}. {remedy}."
        )


def refuse_spread(kind: str) -> None:
    """Raise Incompatible where a kind of accelerate's spreads one model over processes."""
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise Incompatible(
            "Expected one process, or a copy of the model in each, under differential privacy, got "
            f"{kind}: an example's gradient is clipped over all of the model. Leave it out."
        )


def refuse_long_plan(guard: Guard, optimizer: Any, loader: PoissonLoader, steps: float) -> None:
    """Raise Unprotected if a target epsilon does not cover all steps that a trainer still plans.

    Args:
        optimizer, loader: The private ones, of `Guard.prepare`.
        steps: Not finite where a trainer does not know.
    """
    target = guard._protection.step
    if not isinstance(target, PrivacyTarget) or target.epsilon is None or not math.isfinite(steps):
        return
    noise, counted = float(optimizer.noise_multiplier), guard._ledgers[target.name]
    longer = Ledger([*counted.history, (noise, loader.rate, max(int(steps), 1))])
    planned = noise, loader.rate, math.ceil((target.epochs or 1) * len(loader))
    try:
        target.refuse_beyond_target(longer, planned)
    except Unprotected as error:
        spent = longer.spent(target.delta, target.accountant).epsilon
        raise Unprotected(
            f"Expected at most epsilon {target.epsilon:g}, got a training of {int(steps)} more "
            f"steps, which would make it {spent:.4g}, where the defense was told of {planned[2]} "
            "steps in all. Let the trainer plan no "
            "more than these (num_train_epochs, max_steps, max_epochs), protect with more epochs "
            "from the start, or with noise in place of epsilon."
        ) from error


def is_private(guard: Guard) -> bool:
    """Whether training needs a private loader and optimizer.

    Raises:
        Incompatible: A defense of the step acts in `Guard.update` alone.
    """
    steps = [d for d in guard.defenses if isinstance(d, StepDefense)]
    if strangers := [d.name for d in steps if not isinstance(d, Ledgered)]:
        raise Incompatible(
            f"Expected a defense that can guard a training loop, got {strangers[0]}. Take its "
            "gradients from guard.update."
        )
    return bool(steps)


def epsilons(guard: Guard) -> dict[str, float]:
    """Return what was spent, by the name of the metric: `epsilon`, or one for each defense."""
    names = [d.name for d in guard.defenses if isinstance(d, Ledgered)]
    spent = {name: float(guard.privacy_spent(name).epsilon) for name in names}
    return {"epsilon" if len(spent) == 1 else f"epsilon_{n}": e for n, e in spent.items()}


def spent_bytes(guard: Guard) -> bytes:
    """Return what was spent as JSON: the guard's state without what is secret in it."""
    state = guard.state_dict()
    spent = {key: state[key] for key in ("version", "ledger")}
    return to_bytes(spent, draws=False, memory=False)


def save_state(guard: Guard, folder: str | os.PathLike[str], number: int = 0) -> None:
    """Write the guard's state into a checkpoint folder, mode 600.

    Args:
        number: Which of several protected models it is of.
    """
    write_atomically(_state_file(folder, number), guard.state_bytes(), private=True)


def save_spent(guard: Guard, folder: str | os.PathLike[str]) -> None:
    """Write what was spent into a checkpoint folder that may be uploaded, mode 600."""
    write_atomically(_state_file(folder, 0), spent_bytes(guard), private=True)


def load_spent(guard: Guard, folder: str | os.PathLike[str]) -> None:
    """Go on from what `save_spent` wrote."""
    path = _state_file(folder, 0)
    state = path.read_bytes() if path.is_file() else None
    take_state(guard, state, f"without {STATE_FILE}, {folder}", spent_alone=True)


def _state_file(folder: str | os.PathLike[str], number: int) -> Path:
    path = Path(folder) / STATE_FILE
    return path.with_stem(f"{path.stem}_{number}") if number else path


def load_state(guard: Guard, folder: str | os.PathLike[str], number: int = 0) -> None:
    """Go on from the guard's state in a checkpoint folder."""
    path = _state_file(folder, number)
    take_state(guard, path.read_bytes() if path.is_file() else None, f"without {path}")


def save_extras(guard: Guard, folder: str | os.PathLike[str]) -> None:
    """Write what the defenses added to the model into a checkpoint folder, if anything."""
    if extras := guard.extras():
        tensors = {name: t.cpu().contiguous() for name, t in extras.items()}
        write_atomically(Path(folder) / EXTRAS_FILE, save(tensors))


def load_extras(guard: Guard, folder: str | os.PathLike[str]) -> set[str]:
    """Load what `save_extras` wrote, if anything, and return its names."""
    path = Path(folder) / EXTRAS_FILE
    if not path.is_file():
        return set()
    extras = load(path.read_bytes())
    guard.model.load_state_dict(extras, strict=False)
    return set(extras)


def join_ledgers(guard: Guard, earlier: Guard) -> None:
    """Let a guard of another model, trained on the same records, go on from what was spent."""
    for name, ledger in earlier._ledgers.items():
        if name in guard._ledgers:
            guard._ledgers[name].load_state_dict(ledger.state_dict())


def holds_all(guard: Guard, state: bytes) -> bool:
    """Whether a state has the ledger of each defense that the guard's stack counts."""
    return guard._ledgers.keys() <= dict(from_bytes(state)["ledger"] or {}).keys()


def take_counts(guard: Guard, state: bytes) -> None:
    """Count what the state of a checkpoint has spent, where the stack counts it too.

    For weights that are loaded by themselves. An older state has nothing that is not counted.
    """
    ledgers = from_bytes(state)["ledger"] or {}
    for defense in guard.defenses:
        if isinstance(defense, Ledgered) and defense.name in ledgers:
            defense.ledger().load_state_dict(ledgers[defense.name])  # raises for what is none
            with suppress(InputError):
                guard._ledgers[defense.name].load_state_dict(ledgers[defense.name])


def take_state(
    guard: Guard, state: bytes | None, missing: str, *, spent_alone: bool = False
) -> None:
    """Go on from the guard's state of a checkpoint; it may lack one where nothing is counted.

    Args:
        missing: What is told of a checkpoint that lacks it.
        spent_alone: Of a state that `spent_bytes` gave: residuals stay those of the guard.
    """
    kept = {"residuals": guard.state_dict().get("residuals")} if spent_alone else {}
    if state is not None:
        guard.load_state_dict(kept | from_bytes(state))
    elif guard._ledgers:
        raise _no_state(missing)


def _no_state(got: str) -> InputError:
    return expected(
        "a checkpoint with the guard's state", f"one {got}",
        "What was spent before would not count: resume from a checkpoint that vitguard's "
        "integration wrote, or load the weights alone into a new model.",
    )  # fmt: skip


def with_auxiliary(made: Any, auxiliary: Tensor) -> Any:
    """Return what a step made with the defenses' loss added: a loss, or one among other things."""
    if isinstance(made, dict):
        return {**made, "loss": made["loss"] + auxiliary}
    if isinstance(made, tuple):
        return made[0] + auxiliary, *made[1:]
    return made + auxiliary
