"""A head that lets the images of one class alone give a gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitguard.attacks.equations.head import linear_heads
from vitguard.core import Update
from vitguard.errors import NotApplicable, expected
from vitguard.threats.crafts.base import Craft
from vitguard.vit import Anatomy

__all__ = ["Fishing"]

_NEVER = -1e4  # a score at which no class has a probability that float32 can hold


@dataclass(frozen=True)
class Fishing(Craft):
    """Only one class has weights in the head, and the model never predicts it.

    Below the head the gradient of an image is W_c (p_c - [y = c]): with p_c = 0 it is that of the
    images of class c alone, exactly. Where a batch, or the sum of many clients, holds one of them,
    its update is that of one image, and what reads one image reads it. The other classes keep their
    biases. The head's own gradient still sums all images, so that the server does not use it.

    Args:
        label: The class c.

    Raises:
        InputError: A label below 0.

    References:
        Fishing for User Data, arXiv 2202.00580 (class fishing).
    """

    name: ClassVar[str] = "fishing"
    label: int = 0

    def __post_init__(self) -> None:
        if self.label < 0:
            raise expected("a label of at least 0", self.label)

    def weights(
        self, model: nn.Module, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the crafted state dict; see `Craft.weights`."""
        anatomy = Anatomy.of(model)
        if self.label >= anatomy.classes:
            raise NotApplicable(f"no class {self.label} in a head of {anatomy.classes}")
        state = {name: t.detach().clone() for name, t in model.state_dict().items()}
        for head in linear_heads(model, anatomy):
            weight, bias = state[f"{head}.weight"], state.get(f"{head}.bias")
            if bias is None:
                raise NotApplicable(f"{head} has no bias that could rule a class out")
            others = torch.arange(len(weight), device=weight.device) != self.label
            weight[others] = 0
            if not bool(weight.any()):
                raise NotApplicable(f"the head's weights of class {self.label} are zero")
            bias[self.label] = _NEVER
        return state

    def seen(self, update: Update, model: nn.Module) -> Update:
        """Return the update of the one image of that class: times the batch, without the head."""
        if update.kind != "gradient":
            return update
        anatomy = Anatomy.of(model)
        heads = tuple(f"{head}." for head in anatomy.head)
        why = "it holds the gradient of all images"
        own = update.seal({n: why for n in update.tensors if n.startswith(heads)})
        whole = {name: t * update.batch_size for name, t in own.tensors.items()}
        return replace(own, tensors=whole, batch_size=1)
