"""Hugging Face's Trainer with a protected model: loader, optimizer, loss, checkpoint, logs."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vitguard.defenses.privacy.whole import WholeBatches
from vitguard.errors import Incompatible, expected, missing_extra
from vitguard.guard import Guard
from vitguard.integrations.found import (
    epsilons,
    guard_inside,
    is_private,
    join_ledgers,
    load_extras,
    load_spent,
    refuse_compiled,
    refuse_float16,
    refuse_idle,
    refuse_long_plan,
    refuse_spread,
    refuse_upload,
    save_extras,
    save_spent,
    with_auxiliary,
)

try:
    from transformers import Trainer
except ImportError as error:
    raise missing_extra("vitguard.integrations.transformers", "transformers", "hf") from error

__all__ = ["GuardMixin", "GuardedTrainer"]


class GuardMixin:
    """Put it before `Trainer`: `class T(GuardMixin, Trainer)`. The model must be protected.

    Guarantees:
        What defenses added is trained, and their auxiliary loss is part of the loss.
        Under differential privacy every step is private; batches are Poisson samples of as many
        images, on average, as one step of the Trainer has (device batch times accumulation times
        processes), and pass through the model in pieces of one device batch. A step is a step.
        Each checkpoint holds `vitguard.json` (mode 600); resuming goes on from its ledger and its
        weights, those in `vitguard.safetensors` that defenses added too, and is refused without.
        A model that `model_init` makes anew goes on from the ledger of the one before.
        Training whose defenses act on updates alone is refused, unless it is inside `guard.round`,
        or `guard.will_seal` or `guard.keep_local` was called.

    Logs `epsilon`, what was spent so far, and `auxiliary_loss`.

    Examples:
        ```python
        guard = vg.protect(model, "shuffle:ratio=0.5,dal=tokens+privacy:epsilon=8,epochs=3")
        GuardedTrainer(model=model, args=args, train_dataset=dataset).train()
        ```
    """

    # of Trainer
    model: Any
    args: Any
    accelerator: Any
    optimizer: Any
    state: Any
    compute_loss_func: Any
    model_accepts_loss_kwargs: Any
    _prepare_inputs: Any
    _get_output_dir: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._private: WholeBatches | None = None
        self._begins: Any = None
        self._piece: int | None = None
        self._auxiliary: list[Tensor] = []
        self._images = 0
        self._missing: list[str] = []
        self._found: tuple[Any, Guard] | None = None
        super().__init__(*args, **kwargs)
        if is_private(self.guard):
            self._plan()

    @property
    def guard(self) -> Guard:
        """The guard of the model: of the last that `model_init` made, which goes on counting."""
        if self._found is None or self._found[0] is not self.model:
            earlier, guard = self._found, guard_inside(self.model)
            if earlier is not None:
                join_ledgers(guard, earlier[1])
            self._found = self.model, guard
        return self._found[1]

    def _plan(self) -> None:
        """Turn accumulation into pieces of one batch, and refuse what privacy cannot have."""
        self.args = given = copy.copy(self.args)
        refuse_float16("fp16=True", given.fp16, "Set bf16=True")
        refuse_compiled("torch_compile=True", bool(given.torch_compile), "Leave it out")
        asked = ["FSDP"] * bool(given.fsdp) + ["DEEPSPEED"] * bool(given.deepspeed)
        for kind in (*asked, self.accelerator.distributed_type.value):
            refuse_spread(kind)
        if given.n_gpu > 1:
            raise Incompatible(
                f"Expected one device for each process under differential privacy, got "
                f"{given.n_gpu} in one. Start a process for each with torchrun."
            )
        accumulated = given.gradient_accumulation_steps
        self._piece = given.per_device_train_batch_size if accumulated > 1 else None
        given.per_device_train_batch_size *= accumulated
        self._train_batch_size = given.train_batch_size
        given.gradient_accumulation_steps = self.accelerator.gradient_accumulation_steps = 1
        given.ignore_data_skip = True  # every draw is fresh

    @contextmanager
    def _planned(self) -> Iterator[None]:
        """Make loaders plain, of the batch of all processes: the private one shares them out."""
        size, prepare = self._train_batch_size, self.accelerator.prepare
        self._train_batch_size = size * self.args.world_size
        self.accelerator.prepare = lambda loader: loader
        try:
            yield
        finally:
            self._train_batch_size, self.accelerator.prepare = size, prepare

    def get_train_dataloader(self) -> Any:
        if not is_private(self.guard):
            return super().get_train_dataloader()  # type: ignore[misc]
        with self._planned():
            loader = super().get_train_dataloader()  # type: ignore[misc]
        made = super().create_optimizer()  # type: ignore[misc]
        made = getattr(made, "optimizer", made)  # of accelerate, after an earlier train()
        self.optimizer, poisson = self.guard.prepare(made, loader)
        self._private, self._begins = WholeBatches(poisson, self._piece), self.optimizer
        return self._private

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self._private is None:
            super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
            self.optimizer = self.guard.prepare(self.optimizer)
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        refuse_idle(self.guard)
        if self.args.push_to_hub:
            refuse_upload(self.guard, "push_to_hub=True")
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None, *args: Any
    ) -> Tensor:
        step = super().training_step  # type: ignore[misc]
        if self._private is None:
            return step(model, inputs, num_items_in_batch, *args)
        if self._begins is not None:  # now the Trainer knows how far it goes, of a resume too
            more = self.state.max_steps - self.state.global_step
            refuse_long_plan(self.guard, self._begins, self._private.loader, more)
            self._begins = None
        total: Any = 0
        for piece, share, last in self._private.pieces(self._prepare_inputs(inputs)):
            total = total + share * step(model, piece, None, *args)
            if not last:
                self.optimizer.step()
        return total

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        images = _images_in(inputs)
        made = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs, *args, **kwargs
        )
        if not model.training:
            return made
        auxiliary = self.guard.auxiliary_loss()
        if auxiliary.requires_grad:
            self._auxiliary.append(auxiliary.detach())
        counted = kwargs.get("num_items_in_batch", args[0] if args else None)
        if self._private is None and self._is_share(counted):
            auxiliary = auxiliary * (images / max(self._images, images, 1))
        return with_auxiliary(made, auxiliary)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        made = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._images = sum(map(_images_in, made[0]))
        return made

    def _is_share(self, counted: Any) -> bool:
        """Whether the Trainer's own loss is a share of that of all batches that it accumulates.

        Else it is a mean, which the Trainer divides by their number, and what is added to it too.
        """
        if (said := getattr(self, "loss_is_scaled_for_ga", None)) is not None:
            return bool(said)
        takes = self.model_accepts_loss_kwargs and counted is not None
        return takes or self.compute_loss_func is not None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "train_loss" in logs:
            logs |= epsilons(self.guard)
        if "loss" in logs and self._auxiliary:
            logs["auxiliary_loss"] = float(sum(self._auxiliary)) / len(self._auxiliary)
            self._auxiliary.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:  # before the Trainer does, which uploads the folder
            name = f"checkpoint-{self.state.global_step}"
            folder = os.path.join(self._get_output_dir(trial=trial), name)
            os.makedirs(folder, exist_ok=True)
            save_spent(self.guard, folder)
            save_extras(self.guard, folder)
        super()._save_checkpoint(model, trial, *args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        refuse_upload(self.guard, "push_to_hub")
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        load_spent(self.guard, resume_from_checkpoint)
        self._missing = []
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        self._load_the_rest(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._missing = []
        super()._load_best_model()  # type: ignore[misc]
        self._load_the_rest(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        self._missing = [n for n in load_result.missing_keys if n in self.model.state_dict()]
        if not self._missing:
            super()._issue_warnings_after_load(load_result)  # type: ignore[misc]

    def _load_the_rest(self, folder: str) -> None:
        """Load what a checkpoint holds under other names than the model's, and what defenses added.

        transformers 5 writes weights by the names of earlier releases, parts of vitguard's among
        them, and its Trainer reads them by the model's: most of a ViT would stay as it was. PEFT
        writes adapters only.
        """
        loaded, adapters = load_extras(self.guard, folder), _of_peft(self.model)
        missing = {n for n in self._missing if n not in loaded}
        if adapters:
            missing |= self.guard.extras().keys() - loaded
        if not missing:
            return
        state, known = {}, set()
        if hasattr(type(self.model), "from_pretrained") and not adapters:
            with torch.random.fork_rng(devices=[]):
                whole, said = type(self.model).from_pretrained(folder, output_loading_info=True)
            state, known = whole.state_dict(), {*whole.state_dict()} - {*said["missing_keys"]}
        if lost := sorted(missing - known):
            raise expected(
                "a checkpoint with all that the model has", f"{folder} without {lost[0]}",
                "Resume from a checkpoint that vitguard's trainer wrote, or load the weights with "
                "from_pretrained, protect the model and train anew.",
            )  # fmt: skip
        self.model.load_state_dict({**state, **self.guard.extras()}, strict=False)


def _images_in(inputs: Any) -> int:
    values = inputs.values() if isinstance(inputs, Mapping) else ()
    tensors = (t for t in values if isinstance(t, Tensor) and t.dim())
    return next((len(t) for t in tensors), 0)


def _of_peft(model: Any) -> bool:
    return type(model).__module__.startswith("peft.")


class GuardedTrainer(GuardMixin, Trainer):
    """`Trainer` for a protected model; see `GuardMixin`."""
