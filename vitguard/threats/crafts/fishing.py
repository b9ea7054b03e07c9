"""A head that lets the images of one class alone give a gradient, or one image of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitguard.attacks.equations.head import linear_heads
from vitguard.core import Update
from vitguard.errors import NotApplicable, expected
from vitguard.models import normalization_of
from vitguard.threats.crafts.base import Craft
from vitguard.threats.crafts.channels import natural_images
from vitguard.vit import Anatomy, logits_of

__all__ = ["Fishing"]

_NEVER = -1e4  # a score at which no class has a probability that float32 can hold
_NOBODY = 1e-5  # gradient of a class of which there is no image, relative to the largest
_STEEP = 1e3  # scores from one standard deviation of a feature: the class is sure, or never


@dataclass(frozen=True)
class Fishing(Craft):
    """Only one class has weights in the head, and the model never predicts it.

    Below the head the gradient of an image is W_c (p_c - [y = c]): with p_c = 0 it is that of the
    images of class c alone, exactly. Where a batch, or the sum of many clients, holds one of them,
    its update is that of one image, and what reads one image reads it. The head's own gradient
    still sums all images: its bias tells how many are of the class, the rest is not used.

    Where all images are of class c, `quantile` fishes by a feature: class c is certain above a
    threshold of one feature of the head's input, and never below. An image above it has no
    gradient; the one that lies below it alone is read.

    Args:
        label: The class c.
        quantile: Share of drawn images that lie below the threshold, in (0, 1); 0 fishes by class.
        turn: Of a server that changes the craft by the round: the next class, or the next feature.

    Raises:
        InputError: A setting out of range.

    References:
        Fishing for User Data, arXiv 2202.00580 (class fishing, feature fishing).
    """

    name: ClassVar[str] = "fishing"
    label: int = 0
    quantile: float = 0.0
    turn: int = 0

    def __post_init__(self) -> None:
        if self.label < 0:
            raise expected("a label of at least 0", self.label)
        if not 0 <= self.quantile < 1:
            raise expected("a quantile in (0, 1), or 0", self.quantile)
        if self.turn < 0:
            raise expected("a turn of at least 0", self.turn)

    def turned(self, turn: int) -> Fishing:
        """Return the craft for the next class, or by the next feature."""
        return replace(self, turn=self.turn + turn)

    def weights(
        self, model: nn.Module, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the crafted state dict; see `Craft.weights`."""
        anatomy = Anatomy.of(model)
        label = self._label(anatomy)
        state = {name: t.detach().clone() for name, t in model.state_dict().items()}
        for head in linear_heads(model, anatomy):
            weight, bias = state[f"{head}.weight"], state.get(f"{head}.bias")
            if bias is None:
                raise NotApplicable(f"{head} has no bias that could rule a class out")
            others = torch.arange(len(weight), device=weight.device) != label
            weight[others] = 0
            if self.quantile:
                feature, slope, cut = self._threshold(model, head, generator)
                weight[label] = 0
                weight[label, feature] = slope
                bias.fill_(_NEVER)
                bias[(label + 1) % len(bias)] = 0.0
                bias[label] = -slope * cut
                continue
            if not bool(weight.any()):  # a fresh head of zeros would hand no gradient on
                drawn = torch.randn(
                    weight.shape[1], generator=generator or torch.Generator().manual_seed(0)
                )
                weight[label] = drawn.to(weight) / weight.shape[1] ** 0.5
            bias[label] = _NEVER
        return state

    def seen(self, update: Update, model: nn.Module) -> Update:
        """Return the update of the images that gave a gradient: their sum, without the head."""
        one_step = update.kind == "gradient" or (
            update.optimizer == "sgd" and update.local_steps == 1 and not update.weight_decay
        )
        if not one_step:
            return update
        anatomy = Anatomy.of(model)
        count = max(self._count(update, model) or 1, 1)
        heads = tuple(f"{head}." for head in anatomy.head)
        why = "it holds the gradient of all images"
        own = update.seal({n: why for n in update.tensors if n.startswith(heads)})
        scale = update.batch_size / count
        whole = {name: t * scale for name, t in own.tensors.items()}
        return replace(own, tensors=whole, batch_size=count)

    def nothing(self, update: Update, model: nn.Module) -> str:
        """Say that no image was fished, where the head's bias shows it."""
        if self._count(update, model) != 0:
            return ""
        label, batch = self._label(Anatomy.of(model)), update.batch_size
        if self.quantile:
            return f"no image of class {label} lies below the threshold of its feature: turn on"
        return f"no image of class {label} among the {batch} behind the update: label=another"

    def _label(self, anatomy: Anatomy) -> int:
        if self.label >= anatomy.classes:
            raise NotApplicable(f"no class {self.label} in a head of {anatomy.classes}")
        return self.label if self.quantile else (self.label + self.turn) % anatomy.classes

    def _count(self, update: Update, model: nn.Module) -> int | None:
        """Return how many images gave a gradient; None where the update does not tell.

        The gradient of the bias of class c is the mean of p_c - [y = c]: zero beside those of other
        classes where no image is of class c, and no whole number where images were scaled.
        """
        anatomy = Anatomy.of(model)
        bias = f"{linear_heads(model, anatomy)[0]}.bias"
        if not update.can_read(bias):
            return None
        try:
            gradient = update.as_gradient(model).read(bias)
        except NotApplicable:
            return None
        own = float(gradient[self._label(anatomy)])
        if abs(own) <= _NOBODY * float(gradient.abs().max()):
            return 0
        told = -own * update.batch_size
        count = round(told)
        return count if abs(told - count) < 0.05 and 1 <= count <= update.batch_size else None

    def _threshold(
        self, model: nn.Module, head: str, generator: torch.Generator | None
    ) -> tuple[int, float, float]:
        """Return a feature of the head's input, the slope of its score, and where it is 0."""
        features = _features(model, head, generator or torch.Generator().manual_seed(0))
        spread = features.std(0)
        usable = (spread > 1e-6 * spread.max()).nonzero()[:, 0]
        if not len(usable):
            raise NotApplicable("drawn images have no feature that tells them apart")
        feature = int(usable[self.turn % len(usable)])
        cut = float(features[:, feature].quantile(self.quantile))
        return feature, float(_STEEP / spread[feature]), cut


def _features(
    model: nn.Module, head: str, generator: torch.Generator
) -> Float[Tensor, "images width"]:
    """Return what the head reads of drawn images that look natural; no image of a victim."""
    own = copy.deepcopy(model).eval()
    like = next(own.parameters())
    normalization = normalization_of(model)
    images = natural_images(Anatomy.of(model), normalization, generator)
    caught: list[Tensor] = []
    own.get_submodule(head).register_forward_hook(lambda m, args, out: caught.append(args[0]))
    with torch.no_grad():
        for part in images.to(like).split(8):
            logits_of(own(part))
    return torch.cat(caught).double().cpu()
