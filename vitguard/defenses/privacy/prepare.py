"""Making an optimizer and a loader private, as accelerate's prepare does for devices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitguard.defenses.base import Draws
from vitguard.defenses.privacy.accelerated import opened, put_back
from vitguard.defenses.privacy.accounting import Ledger
from vitguard.defenses.privacy.checks import check_model
from vitguard.defenses.privacy.engines import engine_of
from vitguard.defenses.privacy.holders import tensors_of
from vitguard.defenses.privacy.loader import PoissonLoader
from vitguard.defenses.privacy.mixing import refuse_mixing_collate
from vitguard.defenses.privacy.probe import probe
from vitguard.defenses.privacy.samplers import place
from vitguard.defenses.privacy.target import PrivacyTarget
from vitguard.defenses.privacy.training import PrivateTraining
from vitguard.defenses.protection import Protection
from vitguard.errors import Incompatible, UnsupportedModel, expected, missing_extra
from vitguard.vit import Anatomy

__all__ = ["prepare_training"]


def prepare_training(
    defense: PrivacyTarget,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    draws: Draws,
    ledger: Ledger,
) -> tuple[Any, PoissonLoader]:
    """See `DifferentialPrivacy.prepare`."""
    try:
        import opacus  # noqa: F401

        from vitguard.defenses.privacy.optimizer import BookKeepingOptimizer, refuse_optimizer
    except ImportError as error:
        raise missing_extra("DifferentialPrivacy.prepare", "opacus") from error
    if loader is None:
        raise expected("a loader beside the optimizer", "none", "Privacy needs Poisson sampling.")
    given = optimizer
    optimizer, loader = opened(given, loader)
    loader = loader.source if isinstance(loader, PoissonLoader) else loader
    refuse_optimizer(optimizer)
    check_model(model)
    _check_owned(model, optimizer)
    engine = engine_of(defense.engine)
    training = PrivateTraining(engine, probe)
    poisson = PoissonLoader(loader, training, draws, defense.physical_batch)
    refuse_mixing_collate(loader.collate_fn, loader.dataset, poisson.drawn_from)
    if defense.delta >= 1 / poisson.records:
        raise expected(f"delta below 1 / {poisson.records} records", defense.delta)
    if defense.epsilon is not None and defense.epochs is None:
        raise expected("epochs with a target epsilon", "none", "Or give noise instead.")
    steps = math.ceil((defense.epochs or 1) * len(poisson))
    noise = defense.multiplier(poisson.rate, steps)
    planned = (noise, poisson.rate, steps)

    def spend(noise: float, rate: float) -> None:
        ledger.spend(
            noise,
            rate,
            admit=lambda longer: defense.refuse_beyond_target(longer, planned),
            void=draws.void,
        )

    _start_together(model)
    with _replaced(model, training):
        _try_out(model, training, _examples(poisson, model))
        private = BookKeepingOptimizer(
            optimizer,
            model,
            training,
            draws=draws,
            ledger=ledger,
            spend=spend,
            clipping=defense.clipping,
            noise_multiplier=noise,
            max_grad_norm=defense.clip,
            expected_batch_size=poisson.expected_batch_size,
        )
    for p in model.parameters():
        p.grad = None
    return put_back(given, private), poisson


def _start_together(model: nn.Module) -> None:
    """Let every process start from the weights of the first, as DistributedDataParallel does.

    What a defense added starts from a draw of each process, and replicas would stay apart.
    """
    if place()[1] > 1:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                whole = tensor.detach().contiguous()
                torch.distributed.broadcast(whole, 0)
                tensor.copy_(whole)


def _try_out(model: nn.Module, training: PrivateTraining, images: Tensor) -> None:
    """Watch the model from now on, unless its examples meet in training mode."""
    modes = [(module, module.training) for module in model.modules()]
    training.install(model)
    try:
        probe(model.train(), training.engine, (images,))
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _replaced(model: nn.Module, training: PrivateTraining) -> Iterator[None]:
    """Put the training state beside the other defenses' pieces in place of an earlier one.

    Where the block raises, the earlier one goes on: without it the model would not be watched.
    """
    hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    earlier = [owner for owner in hooks if isinstance(owner, PrivateTraining)]
    for one in earlier:
        one.uninstall(model)
        training.exposed = training.exposed or one.exposed  # these weights stay
    try:
        yield
    except BaseException:
        training.uninstall(model)
        for one in earlier:
            one.install(model)
        raise
    if (protection := Protection.of(model)) is not None:
        protection.add_module("privacy", training)


def _check_owned(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    known = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if strangers := [tuple(p.shape) for p in held if id(p) not in known]:
        raise Incompatible(
            "Expected an optimizer of the model's own parameters, got others among them (of shape "
            f"{', '.join(map(str, strangers))}): their gradients would not be clipped. If the "
            "optimizer is older than the protection, which may take parameters out of the model "
            "(fixed positions take pos_embed), build it after protect. A head beside the model "
            "must be its own: in timm model.reset_classifier(classes)."
        )


def _examples(loader: PoissonLoader, model: nn.Module) -> Tensor:
    """Return images like those of training, for the probe, which puts noise in their place.

    Of a model that is no ViT, such as a head on cached features, the first tensor of a batch.
    """
    like = next(model.parameters())
    try:
        anatomy = Anatomy.of(model)
    except UnsupportedModel:
        parts = tensors_of(loader.one())
        rows = [t for t in parts if t.dim() > 1 and t.is_floating_point()]
        images = next((t for t in rows if t.dim() > 2), rows[0] if rows else None)
        if images is None:
            raise expected("batches that hold images or features", "none in the loader") from None
        return images.to(like)
    shape = (3, anatomy.channels, *anatomy.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
