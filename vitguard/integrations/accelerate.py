"""accelerate with a protected model: `prepare` in the right order, checkpoints that count."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vitguard.defenses.privacy.loader import PoissonLoader
from vitguard.defenses.protection import Protection
from vitguard.errors import Incompatible, missing_extra
from vitguard.guard import Guard
from vitguard.integrations.found import (
    guard_inside,
    is_private,
    load_state,
    refuse_accumulation,
    refuse_float16,
    refuse_idle,
    refuse_spread,
    save_state,
)

try:
    from accelerate import Accelerator
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.utils import send_to_device
except ImportError as error:
    raise missing_extra("vitguard.integrations.accelerate", "accelerate", "hf") from error

__all__ = ["PlacedBatches", "prepare", "register"]


def prepare(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, loader: Any, *others: Any
) -> tuple[Any, ...]:
    """Return what `accelerator.prepare` returns, for a protected model.

    Under differential privacy the optimizer adds up over processes by itself, so the model is not
    wrapped for it, and the loader is a Poisson loader whose batches come on the right device; the
    batch size that it was made with is that of all processes together. A scheduler counts a batch
    as a step, in whatever pieces it comes.

    Args:
        model: Protected, not prepared by accelerate.
        optimizer, loader: Of torch, not prepared by accelerate.
        others: Schedulers and other loaders.

    Raises:
        Unprotected: The stack's defenses act on updates alone; see `Guard.will_seal`.
        Incompatible: What was given is prepared already, or privacy cannot have it.
    """
    if any(type(given).__module__.startswith("accelerate.") for given in (optimizer, loader)):
        raise Incompatible(
            "Expected an optimizer and a loader of torch, got what accelerator.prepare made. Give "
            "them to vitguard.integrations.accelerate.prepare in its place."
        )
    guard = guard_inside(model)
    refuse_idle(guard)
    register(accelerator, guard)
    if not is_private(guard):
        optimizer = guard.prepare(optimizer)
        return accelerator.prepare(model, optimizer, loader, *others)
    _refuse(accelerator)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    optimizer, loader = guard.prepare(optimizer, loader)
    prepared = accelerator.prepare(optimizer, *others)
    optimizer, *others_prepared = prepared if others else (prepared,)
    for scheduler in others_prepared:
        if isinstance(scheduler, AcceleratedScheduler):
            scheduler.split_batches = True  # the loader has a step for a batch of all processes
            scheduler.step = _once_a_batch(loader, scheduler.step)
    return model, optimizer, PlacedBatches(loader, accelerator.device), *others_prepared


def _once_a_batch(loader: PoissonLoader, step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a scheduler's step that passes over all but the last piece of a batch."""

    def stepped(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs) if loader.ends_step else None

    return stepped


def register(accelerator: Accelerator, guard: Guard) -> None:
    """Let `save_state` write the guard's state, mode 600, and `load_state` refuse to go on without.

    For a loop that calls `guard.prepare` and then `accelerator.prepare` itself. Of several
    protected models each has a file of its own, in the order in which accelerate counts models. A
    model is kept alive by nothing here.
    """
    known = _REGISTERED.get(accelerator)
    if known is None:
        known = _REGISTERED[accelerator] = []
        _watch(accelerator, known)
    known[:] = [model for model in known if model() is not None]
    if not any(model() is guard.model for model in known):
        known.append(weakref.ref(guard.model))


_Registered = list[weakref.ref[torch.nn.Module]]
_REGISTERED: weakref.WeakKeyDictionary[Accelerator, _Registered] = weakref.WeakKeyDictionary()


def _watch(accelerator: Accelerator, known: _Registered) -> None:
    """Let an accelerator save and load the state of those models that are known by then."""

    def save(models: Any, weights: Any, folder: str | os.PathLike[str]) -> None:
        for number, guard in enumerate(_guards(known, models)):
            if accelerator.is_main_process:
                save_state(guard, folder, number)

    def load(models: Any, folder: str | os.PathLike[str]) -> None:
        for number, guard in enumerate(_guards(known, models)):
            load_state(guard, folder, number)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _guards(known: _Registered, models: Sequence[torch.nn.Module]) -> list[Guard]:
    """Return the guards of an accelerator's models, in the order in which it has them.

    Where it was given none of those that are known, it is the one registered last.
    """
    there = [model for reference in known if (model := reference()) is not None]
    held = dict.fromkeys(m for model in models for m in model.modules())
    found = [m for m in held if any(m is model for model in there)]
    return [Guard.of(m) for m in found or there[-1:] if Protection.of(m) is not None]


def _refuse(accelerator: Accelerator) -> None:
    refuse_spread(accelerator.distributed_type.value)
    refuse_accumulation("gradient_accumulation_steps", accelerator.gradient_accumulation_steps)
    half = accelerator.mixed_precision == "fp16"
    refuse_float16("fp16", half, "Use mixed_precision='bf16'")


class PlacedBatches:
    """A Poisson loader whose batches come on a device."""

    def __init__(self, loader: PoissonLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.dataset = loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield batch if self.device.type == "cpu" else send_to_device(batch, self.device)

    @property
    def ends_step(self) -> bool:
        """Whether the step on the batch handed out last is a full step (`physical_batch`)."""
        return self.loader.ends_step

    def skip(self) -> None:
        """Leave the batch handed out last out of training, as `PoissonLoader.skip` does."""
        self.loader.skip()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"Expected a plain loader for its {name}, got the private one, of which every draw is "
            "fresh: after a resume there is nothing to skip (skip_first_batches). The loader that "
            "it stands in for is loader.source."
        )
