"""What one local step makes of a batch: a gradient, or the weight difference of several."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.core import Batch, LocalTraining, Loss
from vitguard.defenses.protection import Protection
from vitguard.errors import InputError, VitguardError, expected
from vitguard.vit import (
    Anatomy,
    canonical_parameters,
    checkpoints_refused,
    logits_of,
    loss_of,
)

__all__ = ["check_batch", "difference_of", "gradient_of", "trained"]


def check_batch(
    anatomy: Anatomy, images: Tensor, labels: Tensor, loss: Loss = F.cross_entropy
) -> None:
    """Raise InputError where images or labels cannot be a batch of the model and the loss."""
    channels, classes = anatomy.channels, anatomy.classes
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        got = f"{type(images).__name__} and {type(labels).__name__}"
        raise expected("images and labels as tensors", got, "torch.as_tensor makes them.")
    if images.is_meta or labels.is_meta:
        raise expected("images and labels with values", "some on the meta device")
    if images.dim() != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise expected(
            f"floating-point images of shape (batch, {channels}, height, width)",
            f"{images.dtype} of shape {tuple(images.shape)}",
        )
    if len(labels) != len(images) or not len(images):
        raise expected(f"one label for each of {len(images)} images", len(labels))
    if loss is F.cross_entropy or type(loss) is nn.CrossEntropyLoss:
        _check_targets(labels, classes)
    indices = not labels.is_floating_point()
    if indices and classes and not bool(((labels >= 0) & (labels < classes)).all()):
        reach = f"some from {int(labels.min())} to {int(labels.max())}"
        raise expected(f"labels from 0 to {classes - 1}", reach)


def _check_targets(labels: Tensor, classes: int) -> None:
    """Raise InputError where cross-entropy takes no such labels."""
    indices = labels.dtype in (torch.int64, torch.uint8) and labels.dim() == 1
    if not indices and not (labels.is_floating_point() and labels.dim() == 2):
        raise expected(
            "class indices of type torch.int64 and shape (batch,), or chances of shape (batch, "
            f"{classes or 'classes'})", f"{labels.dtype} of shape {tuple(labels.shape)}",
            "labels.long() and labels.flatten() make indices of what holds them.",
        )  # fmt: skip


def trained(model: nn.Module, protection: Protection) -> dict[str, nn.Parameter]:
    """Return the parameters that training moves, by the base model's names."""
    parameters = canonical_parameters(model)
    added = {id(p) for p in protection.parameters()}
    if all(id(p) in added for p in parameters.values()):
        raise expected(
            "a model with a parameter to train", "one that is frozen whole",
            "Unfreeze what the client trains: parameter.requires_grad_(True).",
        )  # fmt: skip
    return parameters


def gradient_of(
    model: nn.Module, protection: Protection, batch: Batch, loss: Loss
) -> dict[str, Tensor]:
    """Return the gradient that the stack allows, by the base model's names."""
    try:
        return _backward(model, protection, batch, loss)
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, VitguardError):
            raise
        # only some models take images of another size, type or device, and each refuses them
        # in its own way
        misfit = _misfit(model, protection.anatomy, batch)
        if misfit is None:
            raise
        raise misfit from error


def difference_of(
    model: nn.Module, protection: Protection, batch: Batch, loss: Loss, training: LocalTraining
) -> dict[str, Tensor]:
    """Return how far the training moves each weight; the model is as it was afterwards."""
    parameters = trained(model, protection)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    added = {id(b) for b in protection.buffers()}  # schedules go on
    counted = [(b, b.detach().clone()) for b in model.buffers() if id(b) not in added]
    stepper = training.stepper(parameters.values())
    held = {name: p.grad for name, p in parameters.items()}
    try:
        for _ in range(training.steps):
            for name, gradient in gradient_of(model, protection, batch, loss).items():
                parameters[name].grad = gradient
            with protection.allowed():
                stepper.step()
        return {name: p.detach() - before[name] for name, p in parameters.items()}
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
                p.grad = held[name]
            for buffer, start in counted:  # such as the means of batch norms
                if not torch.equal(buffer, start):
                    buffer.copy_(start)


def _misfit(model: nn.Module, anatomy: Anatomy, batch: Batch) -> InputError | None:
    """Return what of a batch is not as the model is: size, type or device."""
    own, given = anatomy.image_size, tuple(batch.images.shape[2:])
    if own != given:
        return expected(
            f"images of {own[0]} x {own[1]} pixels", f"{given[0]} x {given[1]}",
            "Resize them, or build the model for their size.",
        )  # fmt: skip
    weight: Any = model.get_submodule(anatomy.patch).weight  # may be parametrised
    images, labels = batch.images, batch.labels
    if (images.device, images.dtype) != (weight.device, weight.dtype):
        return expected(
            f"images in {weight.dtype} on {weight.device}, as the model is",
            f"{images.dtype} on {images.device}",
            "Use images.to(parameter), with a parameter of the model.",
        )
    if labels.device != images.device:
        return expected(f"labels on {images.device}, as the images are", labels.device)
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    if len(images) == 1 and any(norm.training for norm in norms):
        return expected(
            "at least two images, of which batch norms take the mean", "one",
            "Take larger batches, or put the batch norms in eval mode.",
        )  # fmt: skip
    return None


def _backward(
    model: nn.Module, protection: Protection, batch: Batch, loss: Loss
) -> dict[str, Tensor]:
    parameters, step = trained(model, protection), protection.step
    if step is not None:
        with protection.counted([step]), protection.allowed():
            return dict(step.gradient(model, loss, batch, protection.draws))
    own = loss_of(loss, logits_of(model(batch.images)), batch.labels)
    total = own + protection.auxiliary_loss(model)
    with checkpoints_refused():
        gradients = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))
