"""Lightning with a protected model: a mixin for the module, and the callback that it brings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vitguard.defenses.privacy.loader import PoissonLoader
from vitguard.defenses.privacy.whole import WholeBatches
from vitguard.errors import Incompatible, Unprotected, missing_extra
from vitguard.guard import Guard
from vitguard.integrations.found import (
    epsilons,
    guard_inside,
    holds_all,
    is_private,
    refuse_accumulation,
    refuse_compiled,
    refuse_idle,
    refuse_long_plan,
    spent_bytes,
    take_counts,
    take_state,
    with_auxiliary,
)

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import (
        BatchSizeFinder,
        GradientAccumulationScheduler,
        LearningRateFinder,
    )
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as error:
    raise missing_extra("vitguard.integrations.lightning", "lightning", "lightning") from error

__all__ = ["GuardCallback", "GuardMixin", "PrivateBatches"]

_STATE = "vitguard"


class GuardCallback(Callback):
    """Keep the guard's state in the checkpoint, log `epsilon`, refuse defenses that would be idle.

    For a module that calls `guard.prepare` and `guard.auxiliary_loss` itself; `GuardMixin` brings
    it along.

    Guarantees:
        A checkpoint holds the ledger, which holds no secret; resuming without it is refused, and an
        older one changes nothing of it: what was spent since (by `Tuner`, say) stays counted.
        Training whose defenses act on updates alone is refused, unless it is inside `guard.round`,
        or `guard.will_seal` or `guard.keep_local` was called.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        refuse_idle(guard_inside(pl_module))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        used = trainer.train_dataloader
        if isinstance(used, PoissonLoader) and used.physical is not None:
            raise Incompatible(
                "Expected whole batches, which Lightning counts as steps, got the private loader "
                f"with physical_batch={used.physical}: its pieces would be counted, and most of "
                "the training left out. Put GuardMixin before the module, or step on the pieces of "
                "vitguard.defenses.privacy.whole.WholeBatches(loader)."
            )
        if is_private(guard_inside(pl_module)):
            _refuse_clipping_by_value(trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # Lightning makes the gradient in a closure, which torch's own hook comes before
        guard = guard_inside(pl_module)
        for piece in () if is_private(guard) else guard._protection.installed():
            piece.moving(guard.model)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for name, value in epsilons(guard_inside(pl_module)).items():
            pl_module.log(name, value)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        _keep_state(guard_inside(pl_module), checkpoint)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state, guard = _state_in(checkpoint), guard_inside(pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not (state and holds_all(guard, state)):
            take_state(guard, state, "without", spent_alone=True)
        elif state is not None:
            take_counts(guard, state)
            _go_on(guard, checkpoint)


def _go_on(guard: Guard, checkpoint: Mapping[str, Any]) -> None:
    """Put what is counted now into the states of private optimizers, which may be older."""
    step = guard._protection.step
    for state in checkpoint.get("optimizer_states", ()):
        if step is not None and _STATE in state:
            state[_STATE] = guard._ledgers[step.name].state_dict()


def _keep_state(guard: Guard, checkpoint: dict[str, Any]) -> None:
    checkpoint[_STATE] = spent_bytes(guard).decode()


def _state_in(checkpoint: Mapping[str, Any]) -> bytes | None:
    return str(checkpoint[_STATE]).encode() if _STATE in checkpoint else None


class PrivateBatches:
    """What a loader becomes when the optimizer is known: Poisson batches, each in one.

    Args:
        source: The plain loader.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.batches: WholeBatches | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        if self.batches is None:
            raise Unprotected(
                "Expected a pass over the loader that the optimizer was prepared with, got one by "
                "something else: before the Trainer's fit, or of a loader asked for during it. Let "
                "fit go over it, and leave out what asks for loaders anew."
            )
        yield from self.batches


class GuardMixin:
    """Put it before the module: `class T(GuardMixin, Lit)`. A part of the module is protected.

    Protect it in `__init__` or `configure_model`.

    Guarantees:
        What defenses added is trained, and their auxiliary loss is part of the loss.
        Under differential privacy every step is private, on Poisson batches; `physical_batch` cuts
        them inside `training_step`, so that a step is a step.
        What `GuardCallback` says; weights that `load_from_checkpoint` loads bring their ledger.

    Under differential privacy a loader that is no `train_dataloader` of the module is given as
    `trainer.fit(module, module.private(loader))`; a data module returns
    `self.trainer.lightning_module.private(loader)`. Lightning's gradient clipping does nothing
    then, and the loader's batch size is that of all processes together.
    """

    _loader: PrivateBatches | None = None
    _optimizer: Any = None
    _begins: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy has no private optimizer and loader of its own: its `fit` makes them
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]
        return {k: v for k, v in state.items() if k not in ("_optimizer", "_loader", "_begins")}

    @property
    def guard(self) -> Guard:
        """The guard of the protected part."""
        return guard_inside(self)  # type: ignore[arg-type]

    def private(self, loader: Any) -> PrivateBatches:
        """Return the private stand-in of a loader, for `trainer.fit` or a data module."""
        self._loader = PrivateBatches(loader)
        return self._loader

    def configure_callbacks(self) -> list[Any]:
        made = super().configure_callbacks()  # type: ignore[misc]
        return [*(made if isinstance(made, list | tuple) else [made]), GuardCallback()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        _keep_state(self.guard, checkpoint)  # where weights alone are saved no callback is asked

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if (state := _state_in(checkpoint)) is not None:
            take_counts(self.guard, state)

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()  # type: ignore[misc]
        return self.private(loader) if is_private(self.guard) else loader

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:  # type: ignore[attr-defined]
            raise Incompatible(
                "Expected automatic optimization with GuardMixin, got a module that steps by "
                "itself. Call guard.prepare and guard.auxiliary_loss there, and add GuardCallback."
            )
        made = super().configure_optimizers()  # type: ignore[misc]
        plain = _the_optimizer(made)
        private = is_private(self.guard)
        self._optimizer = self._prepared(plain) if private else self.guard.prepare(plain)
        return _replaced(made, plain, self._optimizer)

    def _prepared(self, optimizer: Any) -> Any:
        trainer = self.trainer  # type: ignore[attr-defined]
        compiled = getattr(self, "_compiler_ctx", None) is not None
        refuse_compiled("torch.compile", compiled, "Give the module itself to fit")
        refuse_accumulation("accumulate_grad_batches", _accumulated(trainer))
        _refuse_clipping_by_value(trainer)
        _refuse_finders(trainer)
        if epochs := trainer.reload_dataloaders_every_n_epochs:
            raise Incompatible(
                "Expected one loader for the whole training under differential privacy, got "
                f"reload_dataloaders_every_n_epochs={epochs}: noise and ledger go by the loader "
                "that was prepared. Leave it out: every draw is fresh; for other records call "
                "fit again."
            )
        _ = trainer.estimated_stepping_batches  # asks for the loaders
        used = trainer.train_dataloader
        if self._loader is None or used is not self._loader:
            raise Unprotected(
                "Expected a private training loader, got a plain one given to fit or by a data "
                "module. Give module.private(loader) in its place."
            )
        optimizer, poisson = self.guard.prepare(optimizer, self._loader.source)
        self._loader.batches, self._begins = WholeBatches(poisson), optimizer
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self._loader is None or self._loader.batches is None:
            return self._one_step(batch, batch_idx)
        if self._begins is not None:  # now the trainer knows how far it goes, of a resume too
            more = _steps_to_come(self.trainer, batch_idx)  # type: ignore[attr-defined]
            refuse_long_plan(self.guard, self._begins, self._loader.batches.loader, more)
            self._begins = None
        self._optimizer.zero_grad()  # Lightning does so only before the last piece
        for piece, _, last in self._loader.batches.pieces(batch):
            made = self._one_step(piece, batch_idx)
            if made is None:
                raise Incompatible(
                    "Expected a loss from training_step under differential privacy, got None: "
                    "which batches are left out would tell of their records. Return the loss of "
                    "each; examples without a finite gradient are left out by themselves."
                )
            if last:
                return made
            (made["loss"] if isinstance(made, dict) else made).backward()
            self._optimizer.step()
        return None

    def _one_step(self, batch: Any, batch_idx: int) -> Any:
        step = super().training_step  # type: ignore[misc]
        takes_index = len(inspect.signature(step).parameters) > 1
        made = step(batch, batch_idx) if takes_index else step(batch)
        auxiliary = self.guard.auxiliary_loss()  # read also where the batch is left out
        return None if made is None else with_auxiliary(made, auxiliary)


def _steps_to_come(trainer: Any, batch_idx: int) -> float:
    """Return how many steps a trainer that steps on every batch still plans, this one included.

    It goes by epochs: those before a resume may have had other batches than these.
    """
    batches, epochs, steps = trainer.num_training_batches, trainer.max_epochs, trainer.max_steps
    later = math.inf if epochs in (None, -1) else max(epochs - trainer.current_epoch - 1, 0)
    planned = batches - batch_idx + later * batches
    return planned if steps == -1 else min(planned, steps - trainer.global_step)


def _refuse_clipping_by_value(trainer: Any) -> None:
    """Raise Incompatible where a trainer would clip gradients that are not there yet."""
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise Incompatible(
            'Expected no gradient_clip_algorithm="value" under differential privacy, where each '
            f"example is clipped already, got it with gradient_clip_val={trainer.gradient_clip_val}"
            ". Leave it out."
        )


def _refuse_finders(trainer: Any) -> None:
    """Raise Incompatible for callbacks that ask for another loader in the middle of a fit."""
    for callback in trainer.callbacks:
        remedy = None
        if isinstance(callback, BatchSizeFinder):
            remedy = "Leave it out: physical_batch is what bounds the memory."
        elif isinstance(callback, LearningRateFinder) and not getattr(
            callback,
            "_early_exit",
            False,  # made by a Tuner, and done before training
        ):
            remedy = "Call Tuner(trainer).lr_find(module) before fit, whose steps are counted."
        if remedy is not None:
            raise Incompatible(
                "Expected one loader for the whole training under differential privacy, got "
                f"{type(callback).__name__}, which asks for another one. {remedy}"
            )


def _accumulated(trainer: Any) -> int:
    """Return the most batches in which a trainer steps once."""
    schedules = [c.scheduling for c in trainer.callbacks
                 if isinstance(c, GradientAccumulationScheduler)]  # fmt: skip
    return max(trainer.accumulate_grad_batches, *(max(s.values()) for s in schedules), 1)


def _the_optimizer(made: Any) -> torch.optim.Optimizer:
    """Return the one optimizer in what `configure_optimizers` returned."""
    found = _optimizers_in(made)
    if len(found) != 1:
        raise Incompatible(
            f"Expected one optimizer from configure_optimizers, got {len(found)}. With several, "
            "call guard.prepare there yourself and add GuardCallback."
        )
    return found[0]


def _optimizers_in(made: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers of any form: alone, in lists beside schedulers, in dictionaries."""
    if isinstance(made, torch.optim.Optimizer):
        return [made]
    if isinstance(made, dict):
        return _optimizers_in(made.get("optimizer"))
    if isinstance(made, list | tuple):
        return [optimizer for part in made for optimizer in _optimizers_in(part)]
    return []


def _replaced(made: Any, plain: Any, private: Any) -> Any:
    """Return what `configure_optimizers` returned with the private optimizer in it."""
    if made is plain:
        return private
    if isinstance(made, dict):
        return {key: _replaced(value, plain, private) for key, value in made.items()}
    if isinstance(made, list | tuple):
        return type(made)(_replaced(value, plain, private) for value in made)
    if getattr(made, "optimizer", None) is plain:  # a scheduler: Lightning looks whose it is
        made.optimizer = private
    return made
