"""Soteria: the gradient of the head without the features that tell most of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recipes import Judged
from vitguard.core import Batch, Loss
from vitguard.defenses.base import Defense, Draws, StepDefense
from vitguard.errors import Incompatible, expected
from vitguard.vit import Anatomy, canonical_parameters, logits_of

_LEVEL = 0.1  # added to a feature before it divides, as the authors do


@dataclass(frozen=True)
class Soteria(StepDefense):
    """Zero columns of the head's gradient: features that depend least on the input for their size.

    Guarantees:
        None: no layer but the head is touched.

    Args:
        pruned: Share of the features, in [0, 1].
    """

    name: ClassVar[str] = "soteria"
    pruned: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.pruned <= 1:
            raise expected("pruned in [0, 1]", self.pruned)

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Raise Incompatible without a linear head."""
        modules = dict(model.named_modules())
        if not all(isinstance(modules.get(head), nn.Linear) for head in anatomy.head):
            raise Incompatible(f"Expected a linear head for {self.name}, got {anatomy.head}.")

    def gradient(
        self, model: nn.Module, loss: Loss, batch: Batch, draws: Draws
    ) -> Mapping[str, Tensor]:
        """Return the gradient by base name, with the head's masked."""
        head = model.get_submodule(Anatomy.of(model).head[0])
        held: list[Tensor] = []
        handle = head.register_forward_pre_hook(_Keep(held))
        images = batch.images.clone().requires_grad_()
        try:
            total = loss(logits_of(model(images)), batch.labels)
        finally:
            handle.remove()
        (features,) = held
        slopes = [
            torch.autograd.grad(f.sum(), images, retain_graph=True)[0].flatten(1).norm(dim=1)
            for f in features.unbind(1)
        ]
        told = (torch.stack(slopes, 1) / (features.detach() + _LEVEL)).sum(0).abs()
        kept = told >= told.quantile(self.pruned)
        parameters = canonical_parameters(model)
        made = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
        named = dict(zip(parameters, made, strict=True))
        for name, parameter in parameters.items():
            if parameter is head.weight:
                named[name] = named[name] * kept
        return named


class _Keep:
    def __init__(self, held: list[Tensor]) -> None:
        self.held = held

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.held.append(args[0])


JUDGED = Judged(
    title="Soteria",
    place="features",
    source="Sun et al., arXiv:2012.06043",
    claim="Perturbing the data's representation in one fully connected layer degrades what is "
    "reconstructed, with a certified bound and no loss of accuracy.",
    rebuilt="As the authors' code does it: columns of the head's gradient are zeroed for the 80 % "
    "of features with the smallest slope over size.",
    threat="Nothing is secret.",
    stack=(Soteria(),),
    attack="position",
    found="The defended layer is not read: patches and positions have their exact gradients.",
)
