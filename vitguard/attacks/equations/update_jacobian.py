"""The simulated update at some images, and its derivative as a linear map and its adjoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import charge_update
from vitguard.core import View
from vitguard.errors import NotApplicable

__all__ = ["UpdateJacobian"]

Images = Float[Tensor, "batch channels height width"]
Simulate = Callable[[Tensor], dict[str, Tensor]]


@dataclass(eq=False)
class UpdateJacobian:
    """J of the map from model-input images to the tensors of their update, never written out.

    One graph serves all products: J^T u is a derivative of the update, J v one of J^T u by u.

    Args:
        view: What is attacked; products are charged by its size.
        inputs: Where, model-input units in the model's type.
        names: Of the tensors, in the order of all lists.
        made: The tensors that the inputs make, without a graph.
    """

    view: View
    inputs: Images
    names: list[str]
    made: list[Tensor]

    @staticmethod
    def at(view: View, images: Images, names: Sequence[str], simulate: Simulate) -> UpdateJacobian:
        """Linearise at `images`; `names` that `simulate` does not make are left out.

        Raises:
            NotApplicable: None of them is made, or depends on the images.
        """
        inputs = images.detach().to(next(view.model.parameters())).requires_grad_()
        tensors = simulate(inputs)
        charge_update(view, times=2.0)
        kept = [name for name in names if name in tensors and tensors[name].requires_grad]
        if not kept:
            raise NotApplicable("no tensor of the update can be simulated")
        return UpdateJacobian(view, inputs, kept, [tensors[name] for name in kept])

    def __post_init__(self) -> None:
        self._graph = self.made
        self.made = [tensor.detach() for tensor in self._graph]
        self._blank = [torch.zeros_like(m, requires_grad=True) for m in self.made]
        self._slope = torch.autograd.grad(
            self._graph, self.inputs, self._blank, create_graph=True, materialize_grads=True
        )[0]

    def forth(self, v: Images) -> list[Tensor]:
        """Return J v."""
        charge_update(self.view, times=1.5)
        moved: tuple[Any, ...] = torch.autograd.grad(
            self._slope, self._blank, v.to(self._slope), retain_graph=True, materialize_grads=True
        )
        return list(moved)

    def back(self, u: Sequence[Tensor]) -> Images:
        """Return J^T u."""
        charge_update(self.view, times=1.5)
        return torch.autograd.grad(
            self._graph, self.inputs, list(u), retain_graph=True, materialize_grads=True
        )[0]
