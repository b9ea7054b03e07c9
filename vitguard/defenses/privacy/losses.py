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
from vitguard.vit import loss_of

__all__ = ["PerExample", "auxiliary_losses", "per_example_losses"]


def per_example_losses(loss: Loss, outputs: Any, labels: Tensor) -> Tensor:
    """Return `loss` of each example alone, shape (batch,).

    A criterion is never trusted to be a mean of independent terms: it sees one example at a time,
    unless it is torch's cross-entropy, of which class weights stay weights of the example.

    Raises:
        InputError: The criterion of one example is no single number.
        Unprotected: The criterion of the batch is neither the mean nor the sum of those of its
            examples. One that draws is not held to it.
    """
    if loss is F.cross_entropy:
        return F.cross_entropy(outputs, labels, reduction="none")
    if type(loss) is nn.CrossEntropyLoss and loss.reduction == "mean":
        return F.cross_entropy(
            outputs, labels, reduction="none", weight=loss.weight,
            label_smoothing=loss.label_smoothing, ignore_index=loss.ignore_index,
        )  # fmt: skip
    values = []
    for i in range(len(labels)):
        one = tree_map(lambda t, i=i: t[i : i + 1] if isinstance(t, Tensor) else t, outputs)
        values.append(_number(loss, one, labels[i : i + 1]))
    found = torch.stack(values)
    _refuse_meeting(loss, outputs, labels, found.detach())
    return found


def _number(loss: Loss, one: Any, label: Tensor) -> Tensor:
    if isinstance(one, Tensor):
        return loss_of(loss, one, label).reshape(())
    value: Any = loss(one, label)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise expected("a loss that is one number for one example", value)
    return value.reshape(())


def _refuse_meeting(loss: Loss, outputs: Any, labels: Tensor, alone: Tensor) -> None:
    """Raise Unprotected if a criterion of the batch is another one than of single examples."""
    if len(labels) < 2:
        return

    def of_batch() -> Tensor:
        if isinstance(outputs, Tensor):
            return loss_of(loss, outputs, labels, graded=False).double().mean()
        return loss(outputs, labels).double().mean()

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        whole, again = of_batch(), of_batch()
    fine = alone.dtype in (torch.float32, torch.float64)
    slack = (1e-4 if fine else 3e-2) * alone.double().abs().sum() + 1e-12
    total, count = alone.double().sum(), len(labels)
    known = bool(whole.isfinite()) and bool(total.isfinite()) and bool(whole == again)
    mean = float((whole * count - total).abs()) <= slack
    if known and not mean and float((whole - total).abs()) > slack:
        raise Unprotected(
            "Expected a criterion that is a mean of terms of one example each, got one in which "
            "examples meet (weights with a mean, a contrastive loss): example by example it is "
            "another one. Give weights to nn.CrossEntropyLoss, or take the mean of "
            'F.cross_entropy(outputs, labels, weight=..., reduction="none") yourself.'
        )


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
    mean of independent terms: class weights of `nn.CrossEntropyLoss` stay, and divide by the number
    of examples in place of the sum of their weights.

    Raises:
        Unprotected: Another criterion is no mean of such terms: nothing is changed in silence.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Any, labels: Tensor) -> Tensor:
        return per_example_losses(self.loss, outputs, labels).mean()
