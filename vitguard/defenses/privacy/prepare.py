"""Making an optimizer and a loader private, as accelerate's prepare does for devices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitguard.defenses._base import Draws
from vitguard.defenses.privacy.accounting import Ledger
from vitguard.defenses.privacy.checks import check_model, probe
from vitguard.defenses.privacy.loader import PoissonLoader
from vitguard.defenses.privacy.training import PrivateTraining
from vitguard.errors import Incompatible, Unprotected, UnsupportedModel, expected, missing_extra
from vitguard.vit import Anatomy

if TYPE_CHECKING:
    from vitguard.defenses.privacy.defense import DifferentialPrivacy

__all__ = ["prepare_training"]


def prepare_training(
    defense: DifferentialPrivacy,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    draws: Draws,
    ledger: Ledger,
) -> tuple[Any, PoissonLoader]:
    """See `DifferentialPrivacy.prepare`."""
    try:
        import opacus  # noqa: F401

        from vitguard.defenses.privacy.optimizer import private_optimizer
    except ImportError as error:
        raise missing_extra("DifferentialPrivacy.prepare", "opacus") from error
    if loader is None:
        raise expected("a loader beside the optimizer", "none", "Privacy needs Poisson sampling.")
    optimizer = getattr(optimizer, "original_optimizer", optimizer)
    check_model(model)
    _check_owned(model, optimizer)
    engine = defense._engine()
    training = PrivateTraining(engine)
    poisson = PoissonLoader(loader, training, draws.public_generator(), defense.physical_batch)
    records = len(loader.dataset)
    if defense.delta >= 1 / records:
        raise expected(f"delta below 1 / {records} records", defense.delta)
    if defense.epsilon is not None and defense.epochs is None:
        raise expected("epochs with a target epsilon", "none", "Or give noise instead.")
    steps = math.ceil((defense.epochs or 1) * len(poisson))
    noise = defense.multiplier(poisson.rate, steps)
    _replace(model, training)
    probe(model, _examples(loader, model), engine)
    for p in model.parameters():
        p.grad = None
    training.install(model)
    private = private_optimizer(
        optimizer,
        model,
        training,
        distributed=torch.distributed.is_available() and torch.distributed.is_initialized(),
        noise_multiplier=noise,
        max_grad_norm=defense.clip,
        expected_batch_size=poisson.expected_batch_size,
        generator=draws.public_generator(),  # replaced with the sampler and the noise
    )

    planned = (noise, poisson.rate, steps)

    def count(private: Any) -> None:
        try:
            ledger.spend(
                noise,
                poisson.rate,
                admit=lambda longer: defense.refuse_beyond_target(longer, planned),
                void=draws.void,
            )
        except Unprotected:
            private.zero_grad()
            raise

    private.attach_step_hook(count)  # called before the parameters move
    return private, poisson


def _replace(model: nn.Module, training: PrivateTraining) -> None:
    """Put the training state beside the other defenses' pieces; an earlier one goes."""
    for hook in list(model._forward_pre_hooks.values()):
        earlier = getattr(hook, "__self__", None)
        if isinstance(earlier, PrivateTraining):
            earlier.uninstall(model)
    protection = getattr(model, "vitguard", None)
    if isinstance(protection, nn.Module):
        protection.add_module("privacy", training)


def _check_owned(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    known = {id(p) for p in model.parameters()}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise Incompatible(
            "Expected an optimizer of the model's own parameters, got others among them: their "
            "gradients would not be clipped."
        )


def _examples(loader: Any, model: nn.Module) -> Tensor:
    """Return a few images for the probe: noise where the model's input size is known."""
    like = next(model.parameters())
    try:
        anatomy = Anatomy.of(model)
    except UnsupportedModel:
        count = min(3, len(loader.dataset))
        parts = tree_leaves(loader.collate_fn([loader.dataset[i] for i in range(count)]))
        images = next((t for t in parts if isinstance(t, Tensor) and t.dim() > 2), None)
        if images is None:
            raise expected("batches that hold images", "none in the loader") from None
        return images.to(like)
    shape = (3, anatomy.channels, *anatomy.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
