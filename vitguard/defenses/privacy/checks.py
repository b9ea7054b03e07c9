"""What cannot be private is refused before training: by kind of layer, then by a probe."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitguard.defenses.privacy.engine import Engine
from vitguard.defenses.privacy.losses import auxiliary_losses
from vitguard.defenses.privacy.training import paused
from vitguard.errors import Incompatible

__all__ = ["check_model", "probe"]


def check_model(model: nn.Module) -> None:
    """Raise Incompatible for layers and settings under which no example has its own gradient."""
    _refuse_wrappers(model)
    for name, module in model.named_modules():
        where = f"{type(module).__name__} at {name or 'the root'}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise Incompatible(
                f"Expected layers that treat each example alone, got {where}. Its batch statistics "
                "mix examples: replace it, for instance by GroupNorm or LayerNorm."
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise Incompatible(f"Expected no running statistics of images, got {where}.")
        if getattr(module, "grad_checkpointing", False) or getattr(
            module, "gradient_checkpointing", False
        ):
            raise Incompatible(
                f"Expected activations to be kept, got activation checkpointing in {where}: its "
                "second forward pass is not recorded. Turn it off and set physical_batch instead."
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise Incompatible(f"Expected a model that is not compiled, got {where} compiled.")
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        first = names.setdefault(id(parameter), name)
        if first != name:
            raise Incompatible(
                f"Expected each parameter in one place, got {first} shared with {name}. Untie "
                "them: a gradient clipped in two parts is not clipped."
            )
    if not names:
        raise Incompatible("Expected a model with trainable parameters, got none.")


def _refuse_wrappers(model: nn.Module) -> None:
    wrappers = (
        "DistributedDataParallel",
        "DataParallel",
        "FullyShardedDataParallel",
        "OptimizedModule",
    )
    if type(model).__name__ in wrappers:
        raise Incompatible(
            f"Expected the bare model, got {type(model).__name__} around it. The private optimizer "
            "adds up over processes by itself; do not compile the model."
        )


def probe(model: nn.Module, images: Tensor, engine: Engine) -> None:
    """Record one pass over a few images in training mode and compare with plain gradients.

    Global random state is left as it was; nothing is learned or released.

    Raises:
        Incompatible: The recorded gradients are not those of single examples.
    """
    training = model.training
    model.train()
    images = images.detach().clone().requires_grad_()
    devices = [images.device] if images.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            with paused(model), engine.watch(model, images) as tape:
                outputs = model(images)
            auxiliary = auxiliary_losses(model, len(images))
            engine.verify(model, tape, (outputs, auxiliary), images)
    finally:
        engine.close()
        model.train(training)
