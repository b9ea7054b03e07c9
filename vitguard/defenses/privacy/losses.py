"""Each example's own loss from a criterion for batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vitguard.core import Loss
from vitguard.defenses.base import Installed
from vitguard.errors import Unprotected, expected

__all__ = ["PerExample", "auxiliary_losses", "per_example_losses"]


def per_example_losses(loss: Loss, outputs: Any, labels: Tensor) -> Tensor:
    """Return `loss` of each example alone, shape (batch,).

    A criterion is never trusted to be a mean of independent terms (class weights and
    `ignore_index` are not, and many ignore `.reduction`): it sees one example at a time, unless it
    is plain cross-entropy.

    Raises:
        InputError: The criterion of one example is no single number.
    """
    if loss is F.cross_entropy:
        return F.cross_entropy(outputs, labels, reduction="none")
    if type(loss) is nn.CrossEntropyLoss and loss.weight is None and loss.reduction == "mean":
        smoothing, ignored = loss.label_smoothing, loss.ignore_index
        return F.cross_entropy(
            outputs, labels, reduction="none", label_smoothing=smoothing, ignore_index=ignored
        )
    values = []
    for i in range(len(labels)):
        one = tree_map(lambda t, i=i: t[i : i + 1] if isinstance(t, Tensor) else t, outputs)
        value = loss(one, labels[i : i + 1])
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise expected("a loss that is one number for one example", value)
        values.append(value.reshape(()))
    return torch.stack(values)


def auxiliary_losses(model: nn.Module, size: int) -> list[Tensor]:
    """Return the losses that the defenses on a model add to each example, (size,) each.

    Raises:
        Unprotected: A defense has a total only, which cannot be clipped by example.
    """
    found = []
    for piece in (m for m in model.modules() if isinstance(m, Installed)):
        values = piece.per_example_auxiliary()
        if values is None and piece.auxiliary_loss() is None:
            continue
        if values is None or values.shape != (size,):
            raise Unprotected(
                f"Expected an auxiliary loss for each example from {type(piece).__name__}, got a "
                "total: its gradient cannot be clipped by example. Leave that loss out."
            )
        found.append(values)
    return found


class PerExample(nn.Module):
    """A criterion applied to one example at a time, then averaged.

    In a training loop under differential privacy a criterion in which examples meet (class weights
    with a mean, a contrastive loss) voids the bound on one example's influence. This makes it a
    mean of independent terms.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Any, labels: Tensor) -> Tensor:
        return per_example_losses(self.loss, outputs, labels).mean()
