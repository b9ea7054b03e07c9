"""The nouns that defenses, attacks and the audit share: Batch, Update, View, Guess."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vitguard.errors import Blocked, InputError, NotApplicable, expected
from vitguard.tensor_files import FACTS as _FACTS
from vitguard.tensor_files import read_update, write_update

__all__ = [
    "AffineSpace",
    "Batch",
    "Bins",
    "Blocked",
    "Crafted",
    "Guess",
    "LocalTraining",
    "Loss",
    "Normalization",
    "Objective",
    "Shuffle",
    "Traits",
    "Update",
    "View",
    "tensors_by_name",
]

Loss = Callable[[Tensor, Tensor], Tensor]
_OPTIMIZERS = ("sgd", "adam", "adamw")


def tensors_by_name(given: object) -> dict[str, Tensor]:
    """Return tensors by name, NumPy arrays and scalars of numbers taken in as tensors.

    Raises:
        InputError: It is no mapping from names, or holds something else.
    """
    if not isinstance(given, Mapping):
        raise expected(
            "tensors by name, such as a state dict", type(given).__name__,
            "Pair a list with its names: dict(zip(names, arrays, strict=True)).",
        )  # fmt: skip
    return {_name(name): _taken(name, value) for name, value in given.items()}


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise expected("names that are text", repr(name)[:80])
    return name


def _taken(name: object, value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray | np.generic):
        raise expected(
            f"a tensor or NumPy array for {name}", type(value).__name__,
            "torch.as_tensor makes one of most things.",
        )  # fmt: skip
    # a copy in the machine's byte order: the caller's array may be read-only, or change later
    array = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise expected(f"numbers that torch knows for {name}", array.dtype) from error


@dataclass(frozen=True)
class Batch:
    """Images as the model takes them (normalised), with their labels."""

    images: Float[Tensor, "batch channels height width"]
    labels: Tensor


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation between pixels in [0, 1] and model input."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise expected("as many means as standard deviations", f"{self.mean} and {self.std}")
        # 2 leaves room for inputs that are only scaled; of pixels in [0, 1] none exceeds 0.5
        if not (all(0 <= m <= 1 for m in self.mean) and all(0 < s <= 2 for s in self.std)):
            raise expected(
                "means in [0, 1] and standard deviations in (0, 2], for pixels in [0, 1]",
                f"{self.mean} and {self.std}",
                "Divide those of pixels in 0 to 255 by 255.",
            )

    def apply(self, pixels: Tensor) -> Tensor:
        """Map pixels in [0, 1], shape (..., channels, height, width), to model input."""
        return (pixels - self._column(self.mean, pixels)) / self._column(self.std, pixels)

    def invert(self, images: Tensor) -> Tensor:
        """Map model input back to pixels; values outside [0, 1] are kept."""
        return images * self._column(self.std, images) + self._column(self.mean, images)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


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

    learning_rate: float | None = None
    steps: int = 1
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in _OPTIMIZERS:
            raise expected(f"optimizer among {', '.join(_OPTIMIZERS)}", repr(self.optimizer))
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise expected("a finite learning rate above 0", self.learning_rate)
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

    tensors: Mapping[str, Tensor]
    kind: Literal["gradient", "difference"] = "gradient"
    batch_size: int = 1
    local_steps: int = 1
    learning_rate: float | None = None
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    sealed: Mapping[str, str] = field(default_factory=dict)
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    clipped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("gradient", "difference"):
            raise expected("kind 'gradient' or 'difference'", repr(self.kind))
        counts = (self.batch_size, self.local_steps)
        if not all(isinstance(n, int) and n >= 1 for n in counts):
            raise expected(
                "whole batch_size and local_steps of at least 1",
                f"batch_size={self.batch_size}, local_steps={self.local_steps}",
            )
        rate = self.learning_rate
        if rate is not None and not 0 < rate < float("inf"):
            raise expected("a finite learning rate above 0", rate)
        if not (0 <= self.momentum < 1 and 0 <= self.weight_decay < float("inf")):
            raise expected(
                "momentum in [0, 1) and weight decay of at least 0",
                f"momentum={self.momentum}, weight_decay={self.weight_decay}",
            )
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
        weights = dict(model.named_parameters())
        tensors = {}
        for name, delta in self.tensors.items():
            gradient = delta / -self.learning_rate
            if self.weight_decay and name in weights:
                gradient = gradient - self.weight_decay * weights[name].detach().to(gradient)
            tensors[name] = gradient
        return replace(self, tensors=tensors, kind="gradient")

    def save(self, path: str | Path) -> None:
        """Write the update as safetensors, its public facts in the header; atomic.

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


@dataclass(frozen=True)
class AffineSpace:
    """Per-patch affine spaces in model-input units: x_i = origin_i + basis_i v.

    Args:
        origin: Shape (patches, pixels per patch).
        basis: Shape (patches, pixels per patch, directions), or (pixels, directions) shared by all.
    """

    origin: Float[Tensor, "patches pixels"]
    basis: Tensor


@dataclass(frozen=True)
class Guess:
    """What an attack returns.

    Args:
        images: Pixels in [0, 1], shape (guessed, channels, height, width). One image may stand
            for a whole batch; none (guessed = 0) says that only labels were recovered.
        labels: Shape (batch,). With one image per label they are in the order of the images, where
            the attack can tell the order.
        verified: Shape (guessed, patches): patches that the attack itself proved to be right. Of
            an incomplete batch, right for one of its images at that position.
        shuffled: Shape (guessed, patches): positions the attack found to be shuffled.
        space: What is known exactly where the image is not.
        fitted: Whether the images were fitted to the update, so that reproducing it proves nothing.
        details: Plain facts for the report (rung, residual, rank); JSON values only. A non-empty
            `unfinished` names what a budget left out: nothing has resisted then.
    """

    images: Float[Tensor, "guessed channels height width"]
    labels: Int[Tensor, " batch"] | None = None
    verified: Bool[Tensor, "guessed patches"] | None = None
    shuffled: Bool[Tensor, "guessed patches"] | None = None
    space: AffineSpace | None = None
    fitted: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Objective:
    """The public loss that a gradient is the derivative of, for attacks that move the weights.

    Args:
        parameters: `() -> {name: weight}` of the readable weights; they are the attack's own copy.
        loss: `(images, labels, generator, shuffled) -> loss` of model-input images under the known
            settings; the last two as in `View.simulate`.
    """

    parameters: Callable[[], Mapping[str, nn.Parameter]]
    loss: Callable[..., Tensor]


@dataclass(frozen=True)
class Shuffle:
    """What is public of a defense that moves patches: all but which ones.

    Args:
        most: Positions of one image that it moves at most.
        exactly: Whether it is always as many.
        per_batch: Whether all images of a batch share one draw.
        unknown: Name in `View.extras` of the embedding that moved patches get for their position.
    """

    most: int
    exactly: bool = False
    per_batch: bool = False
    unknown: str = ""


@dataclass(frozen=True)
class Traits:
    """What is publicly true of an update under a stack of defenses, whatever their names.

    Each defense says how it changes them (`Defense.traits`), and the stack is folded.

    Args:
        positions: Whether absolute positions are `learnable`, `fixed` (no gradient, values public),
            `withheld` (trained, but never sent), or there are `none`.
        low_rank: Whether fixed positions span fewer dimensions than there are patches.
        exact: Whether readable tensors are the true gradient up to rounding and known factors.
        sparse: Whether entries may be zero that were not.
        rank: Singular values of each matrix that are sent at most; 0 where all are.
        noise: Standard deviation of noise added to each tensor, relative to the root mean square
            that the tensor had; 0 where there is none or its size is not known so.
        information: Nats that one release tells of one image at most, by proof: infinite without
            a guarantee. Of a gradient in a ball of radius C under Gaussian noise of standard
            deviation sigma C no more than 1 / (2 sigma^2) gets through (the capacity of a Gaussian
            channel).
        shuffle: What is known of moved patches; None where none is moved.
        sealed: Selections of tensors that exist but cannot be read, as `EncryptedGradients` takes
            them.
        accepted: Whether the user accepts what the analysis of the sealed tensors says remains.
    """

    positions: Literal["learnable", "fixed", "withheld", "none"] = "learnable"
    low_rank: bool = False
    exact: bool = True
    sparse: bool = False
    rank: int = 0
    noise: float = 0.0
    information: float = math.inf
    shuffle: Shuffle | None = None
    sealed: tuple[str, ...] = ()
    accepted: bool = False


@dataclass(frozen=True, eq=False)
class Bins:
    """Rows of a linear layer whose thresholds a server put in order along one direction.

    The gradients of neighbouring rows differ by the tokens between their thresholds.

    Args:
        layer: Module name of the linear layer.
        rows: Its rows by ascending threshold, shape (groups, bins). With one group for each patch
            position, a group sees the tokens of its position only; one group alone sees all.
        direction: Rows of several layers that measure along the same direction have the same
            number.
    """

    layer: str
    rows: Int[Tensor, "groups bins"]
    direction: int


@dataclass(frozen=True)
class Crafted:
    """What a malicious server knows of the weights that it wrote, beside the weights themselves.

    Args:
        craft: Name of the craft.
        settings: Its settings, for the report.
        bins: Where it made rows that tell single tokens apart.
    """

    craft: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    bins: tuple[Bins, ...] = ()


@dataclass(frozen=True)
class View:
    """What one threat grants an attack (Kerckhoffs: everything but draws and keys).

    Args:
        model: A clean copy of the public model before the step: the original architecture, no
            hooks, secrets or generators of a defense. Fixed positions stand in it as parameters.
        update: What left the victim's machine.
        image_shape: (channels, height, width) of one image.
        normalization: From pixels to model input; public.
        classes: Number of classes of the head.
        settings: Settings of each defense that runs, by its name, for the report. An attack reads
            `traits`.
        extras: Public tensors that a defense added, by name.
        traits: What the defenses make true of the update.
        simulate: `(images, labels, generator, shuffled=None, pruned=True) -> Update`, the
            differentiable update that the known settings make of model-input images: fixed
            positions, clipping, pruning as the update shows it, no noise. Labels are class
            indices or probabilities; `shuffled`, (batch, patches), are positions known to be
            shuffled, else masks are drawn; with `pruned=False` entries that a defense zeroes keep
            their values. It carries the graph of `images` and `labels`.
        objective: The loss whose gradient `simulate` returns, or None where the update is anything
            but that gradient.
        random: `() -> bool`: whether the model itself draws while it trains (dropout, drop path),
            so that `simulate` is random whatever the defenses do.
        crafted: What the server wrote into the weights; None where they are honest.
    """

    model: nn.Module
    update: Update
    image_shape: tuple[int, int, int]
    normalization: Normalization
    classes: int
    settings: Mapping[str, Mapping[str, Any]]
    extras: Mapping[str, Tensor]
    simulate: Callable[..., Update]
    objective: Objective | None = None
    random: Callable[[], bool] = lambda: False
    traits: Traits = Traits()
    crafted: Crafted | None = None

    @property
    def unknown(self) -> Tensor | None:
        """The public embedding that stands in for the position of moved patches, if any moved."""
        shuffle = self.traits.shuffle
        return None if shuffle is None else self.extras.get(shuffle.unknown)

    def read(self, name: str) -> Tensor:
        """Return the update's tensor `name` in float64, or raise `Blocked`."""
        return self.update.read(name).detach().to(torch.float64)

    def weight(self, name: str) -> Tensor:
        """Return the public model's parameter or buffer `name` in float64."""
        for store in (self.model.named_parameters(), self.model.named_buffers()):
            for key, value in store:
                if key == name:
                    return value.detach().to(torch.float64)
        raise KeyError(name)

    def bias(self, layer: str) -> Tensor:
        """Return the public bias of a layer in float64: zeros where it has none."""
        if any(name == f"{layer}.bias" for name, _ in self.model.named_parameters()):
            return self.weight(f"{layer}.bias")
        weight = self.weight(f"{layer}.weight")
        return weight.new_zeros(len(weight))

    def gradient(self, *, steps: bool = False) -> View:
        """Return the view with its update turned into a gradient (see `Update.as_gradient`)."""
        return replace(self, update=self.update.as_gradient(self.model, steps=steps))
