"""What an adversary is granted of an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitguard.core.batch import Normalization
from vitguard.core.crafted import Crafted
from vitguard.core.parameters import canonical_tensors
from vitguard.core.update import Update

__all__ = ["Objective", "Shuffle", "Traits", "View"]


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
        layerwise: Whether each layer has a positive factor of its own that nobody knows, as where
            layers are clipped one by one.
        sparse: Whether entries may be zero that were not.
        rank: Singular values of each matrix that are sent at most; 0 where all are.
        noise: Standard deviation of noise added to each tensor, relative to the root mean square
            that the tensor had; 0 where there is none or its size is not known so.
        rescaled: Whether each tensor, once noised, is brought back to the mean and the norm about
            it that it had: values and noise are then both smaller, and `noise` is still their
            ratio.
        information: Nats that one release tells of one image at most, by proof: infinite without
            a guarantee. Of a gradient in a ball of radius C under Gaussian noise of standard
            deviation sigma C no more than 1 / (2 sigma^2) gets through (the capacity of a Gaussian
            channel).
        shuffle: What is known of moved patches; None where none is moved.
        sealed: Selections of tensors that exist but cannot be read, as `EncryptedGradients` takes
            them.
        accepted: Whether the user accepts what the analysis of the sealed tensors says remains.
        frozen: Parameters that are not trained, so that no update contains them: names, or their
            beginnings up to a dot.
    """

    positions: Literal["learnable", "fixed", "withheld", "none"] = "learnable"
    low_rank: bool = False
    exact: bool = True
    layerwise: bool = False
    sparse: bool = False
    rank: int = 0
    noise: float = 0.0
    rescaled: bool = False
    information: float = math.inf
    shuffle: Shuffle | None = None
    sealed: tuple[str, ...] = ()
    accepted: bool = False
    frozen: tuple[str, ...] = ()

    def freezes(self, name: str) -> bool:
        """Whether a parameter is among `frozen`."""
        return any(name.startswith(f) if f.endswith(".") else name == f for f in self.frozen)


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
        earlier: What it saw in earlier rounds of the same images, with weights of those rounds.
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
    earlier: tuple[View, ...] = ()

    @property
    def unknown(self) -> Tensor | None:
        """The public embedding that stands in for the position of moved patches, if any moved."""
        shuffle = self.traits.shuffle
        return None if shuffle is None else self.extras.get(shuffle.unknown)

    def read(self, name: str) -> Tensor:
        """Return the update's tensor `name` in float64, or raise `Blocked`."""
        return self.update.read(name).detach().to(torch.float64)

    def weight(self, name: str) -> Tensor:
        """Return the public model's parameter or buffer `name` in float64.

        Args:
            name: Of the base model, as in the update, whatever wraps the model (PEFT, DDP).
        """
        return canonical_tensors(self.model)[name].detach().to(torch.float64)

    def bias(self, layer: str) -> Tensor:
        """Return the public bias of a layer in float64: zeros where it has none."""
        known = canonical_tensors(self.model)
        if (bias := known.get(f"{layer}.bias")) is not None:
            return bias.detach().to(torch.float64)
        weight = self.weight(f"{layer}.weight")
        return weight.new_zeros(len(weight))

    def gradient(self, *, steps: bool = False) -> View:
        """Return the view with its update turned into a gradient (see `Update.as_gradient`)."""
        return replace(self, update=self.update.as_gradient(self.model, steps=steps))
