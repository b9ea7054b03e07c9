"""What a client sends: an update, and the local training that made it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vitguard.core.names import tensors_by_name
from vitguard.core.parameters import canonical_tensors
from vitguard.errors import Blocked, InputError, NotApplicable, expected
from vitguard.tensor_files import FACTS as _FACTS
from vitguard.tensor_files import read_update, write_update

__all__ = ["LocalTraining", "Update"]

_OPTIMIZERS = ("sgd", "adam", "adamw")

if TYPE_CHECKING:  # what an update holds; it takes arrays, and their numbers, in as well
    TakenIn, Whole, Real = Mapping[str, Tensor], int, float
else:
    TakenIn, Whole, Real = Mapping[str, Any], Any, Any


@dataclass(frozen=True)
class LocalTraining:
    """How a client makes its update: one gradient, or the difference of local steps.

    Args:
        learning_rate: None for one gradient; otherwise the rate of the steps behind a difference.
        steps: Full-batch local steps.
        optimizer: `sgd`, `adam` or `adamw`, with torch's defaults for what is not said here.
        momentum: Of SGD, in [0, 1).
        weight_decay: At least 0; added to the gradient, by `adamw` to the step.

    Raises:
        InputError: A value out of range, or steps without a learning rate.
    """

    learning_rate: Real | None = None
    steps: Whole = 1
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: Real = 0.0
    weight_decay: Real = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in _OPTIMIZERS:
            raise expected(f"optimizer among {', '.join(_OPTIMIZERS)}", repr(self.optimizer))
        if not (steps := _count(self.steps)):
            raise expected("whole local steps, at least 1", repr(self.steps))
        object.__setattr__(self, "steps", steps)
        _take_rates(self)
        if self.learning_rate is None and self.steps != 1:
            raise expected("a learning rate with several local steps", "none")
        if self.momentum and self.optimizer != "sgd":
            raise expected("momentum with sgd", f"momentum={self.momentum} with {self.optimizer}")

    @staticmethod
    def of(update: Update) -> LocalTraining | None:
        """Return what an update says of its making; None where that cannot be repeated."""
        if update.kind == "gradient":
            return LocalTraining()
        if update.learning_rate is None or update.optimizer not in _OPTIMIZERS:
            return None
        return LocalTraining(
            update.learning_rate,
            update.local_steps,
            update.optimizer,  # type: ignore[arg-type]
            update.momentum,
            update.weight_decay,
        )

    def facts(self) -> dict[str, Any]:
        """Return the public facts of an update that was made so, as arguments of `Update`."""
        if self.learning_rate is None:
            return {}
        return {
            "kind": "difference",
            "local_steps": self.steps,
            "learning_rate": self.learning_rate,
            "optimizer": self.optimizer,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }

    def stepper(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of these steps."""
        settings: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, momentum=self.momentum, **settings)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, **settings)

    def __str__(self) -> str:
        if self.learning_rate is None:
            return "one gradient"
        steps = "step" if self.steps == 1 else "steps"
        words = [
            f"difference after {self.steps} {self.optimizer} {steps} at rate {self.learning_rate:g}"
        ]
        words += [f"momentum {self.momentum:g}"] if self.momentum else []
        words += [f"weight decay {self.weight_decay:g}"] if self.weight_decay else []
        return ", ".join(words)


@dataclass(frozen=True)
class Update:
    """All that leaves the machine.

    Args:
        tensors: What anyone can read, by the base model's parameter name; NumPy arrays are taken
            in as tensors.
        kind: `"gradient"`, or `"difference"` (weights after minus weights before).
        batch_size: Images behind the update; public.
        local_steps, learning_rate, optimizer, momentum, weight_decay: How a difference was made;
            public.
        sealed: Names that exist but cannot be read, each with its reason.
        payloads: What a defense sends in place of sealed tensors (ciphertext), by defense name.
        clipped: How many values of a tensor a defense moved to a bound, those that were not finite
            included. A fact about the message; a saved update does not keep it.
    """

    tensors: TakenIn
    kind: Literal["gradient", "difference"] = "gradient"
    batch_size: Whole = 1
    local_steps: Whole = 1
    learning_rate: Real | None = None
    optimizer: str = "sgd"
    momentum: Real = 0.0
    weight_decay: Real = 0.0
    sealed: Mapping[str, str] = field(default_factory=dict)
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    clipped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("gradient", "difference"):
            raise expected("kind 'gradient' or 'difference'", repr(self.kind))
        counts = _count(self.batch_size), _count(self.local_steps)
        if not all(counts):
            raise expected(
                "whole batch_size and local_steps of at least 1",
                f"batch_size={self.batch_size!r}, local_steps={self.local_steps!r}",
            )
        object.__setattr__(self, "batch_size", counts[0])
        object.__setattr__(self, "local_steps", counts[1])
        _take_rates(self)
        object.__setattr__(self, "tensors", tensors_by_name(self.tensors))
        if both := sorted(set(self.tensors) & set(self.sealed)):
            raise expected("sealed names without a readable tensor", both[0])

    def __repr__(self) -> str:
        readable = sum(t.numel() for t in self.tensors.values())
        return (
            f"Update(kind={self.kind!r}, batch_size={self.batch_size}, "
            f"{len(self.tensors)} tensors with {readable} values readable, "
            f"{len(self.sealed)} sealed)"
        )

    def can_read(self, name: str) -> bool:
        """Whether `read(name)` would return a tensor."""
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        """Return the plain tensor called `name`.

        Raises:
            Blocked: The name is sealed, or the update never contained it.
        """
        if name in self.tensors:
            return self.tensors[name]
        raise Blocked(name, self.sealed.get(name, "it is not in the update"))

    def seal(self, names: Mapping[str, str]) -> Update:
        """Return the update with each of `names` (name -> reason) made unreadable."""
        tensors = {k: v for k, v in self.tensors.items() if k not in names}
        return replace(self, tensors=tensors, sealed={**self.sealed, **names})

    def as_gradient(self, model: nn.Module, *, steps: bool = False) -> Update:
        """Turn the difference of plain SGD steps into a gradient (docs/methods.md 1).

        `model` holds the weights before the step, for weight decay. With `steps=True` the sum of
        the gradients of several steps is returned; otherwise more than one step is refused.

        Raises:
            NotApplicable: The difference does not determine a gradient.
        """
        if self.kind == "gradient":
            return self
        if self.optimizer != "sgd":
            raise NotApplicable(f"a difference of {self.optimizer} steps is not a gradient")
        if self.learning_rate is None:
            raise NotApplicable("the learning rate of the difference is not known")
        if self.local_steps > 1 and not steps:
            raise NotApplicable(f"needs one gradient, got {self.local_steps} local steps")
        if self.local_steps > 1 and self.weight_decay:
            raise NotApplicable("several local steps with weight decay do not sum to gradients")
        weights = canonical_tensors(model)
        tensors = {}
        for name, delta in self.tensors.items():
            gradient = delta / -self.learning_rate
            if self.weight_decay and name in weights:
                gradient = gradient - self.weight_decay * weights[name].detach().to(gradient)
            tensors[name] = gradient
        return replace(self, tensors=tensors, kind="gradient")

    def save(self, path: str | Path) -> None:
        """Write the update as safetensors, its public facts in the header; atomic.

        The file is readable by its owner alone: an update may show the images behind it.

        Raises:
            InputError: A tensor is sparse, quantised, without values, or of a type such as float8;
                or the path cannot be written.
        """
        facts = {name: getattr(self, name) for name in _FACTS} | {"sealed": dict(self.sealed)}
        write_update(path, facts, self.tensors, self.payloads)

    @staticmethod
    def load(path: str | Path) -> Update:
        """Read an update written by `save`.

        Raises:
            InputError: The file is missing, is no safetensors file, or lacks sound public facts.
        """
        try:
            return Update(**read_update(path))
        except InputError as error:
            message = str(error)
            raise InputError(message if str(path) in message else f"{path}: {message}") from error


def _count(value: object) -> int:
    """Return a whole number of at least 1, NumPy's and torch's too; 0 for anything else."""
    try:
        return max(operator.index(value), 0)  # type: ignore[arg-type]
    except TypeError:
        return 0


def _take_rates(made: LocalTraining | Update) -> None:
    """Take in the numbers of a training as Python's own, which files can hold.

    Raises:
        InputError: One is no number, or out of range.
    """
    said = f"momentum={made.momentum!r}, weight_decay={made.weight_decay!r}"
    rate, momentum, decay = map(_number, (made.learning_rate, made.momentum, made.weight_decay))
    if made.learning_rate is not None and not 0 < rate < float("inf"):
        raise expected("a finite learning rate above 0", repr(made.learning_rate))
    if not (0 <= momentum < 1 and 0 <= decay < float("inf")):
        raise expected("momentum in [0, 1) and weight decay of at least 0", said)
    if made.learning_rate is not None:
        object.__setattr__(made, "learning_rate", rate)
    object.__setattr__(made, "momentum", momentum)
    object.__setattr__(made, "weight_decay", decay)


def _number(value: object) -> float:
    """Return a number as a float, not a number for anything else."""
    try:
        return value if isinstance(value, float) else operator.index(value)  # type: ignore
    except TypeError:
        pass
    number = getattr(value, "item", lambda: None)()  # of NumPy and torch, of a single value
    return float(number) if isinstance(number, int | float) else float("nan")
