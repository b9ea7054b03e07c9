"""Opacus's optimizer with the book-keeping engine in place of per-sample gradients.

This file imports opacus; it is loaded by `DifferentialPrivacy.prepare` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus.optimizers import DistributedDPOptimizer, DPOptimizer
from torch import nn

from vitguard.defenses.privacy.engine import clipped_sum
from vitguard.defenses.privacy.training import PrivateTraining
from vitguard.errors import Incompatible, Unprotected

__all__ = ["private_optimizer"]


class _BookKeeping:
    """What changes in Opacus's optimizer: where the clipped sum comes from. Noise, averaging,
    the distributed sum and the step stay Opacus's."""

    params: list[nn.Parameter]
    max_grad_norm: float
    step_hook: Callable[[Any], None] | None
    original_optimizer: torch.optim.Optimizer
    add_noise: Callable[[], None]
    scale_grad: Callable[[], None]
    _is_last_step_skipped: bool

    def watch(self, model: nn.Module, training: PrivateTraining) -> None:
        """Take clipped sums from `training`, and let the wrapped optimizer step only from here."""
        self._training = training
        self._names = {id(p): n for n, p in model.named_parameters()}
        self._open = False
        self._handle = self.original_optimizer.register_step_pre_hook(self._refuse_others)

    def _refuse_others(self, *_: Any) -> None:
        if not self._open and self._training.live:
            raise Unprotected(
                "Expected a step of the private optimizer, got one of the optimizer it replaced. "
                "Use the optimizer that guard.prepare returned."
            )

    @property
    def accumulated_iterations(self) -> int:
        """Opacus divides by it; pieces of one batch are one iteration here."""
        return 1

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by `GradScaler.step`, before it does anything else."""
        raise Incompatible(
            "Expected private steps without a GradScaler, got one that is enabled: its scale would "
            "change what is clipped. Call loss.backward() and optimizer.step(); bfloat16 autocast "
            "needs no scaler."
        )

    def clip_and_accumulate(self) -> None:
        tape, real, self._last = self._training.take()
        if leaked := tape.leak():
            raise Unprotected(
                f"Expected every gradient to come through clipping, got one of {leaked} around it: "
                "a loss outside the model's own forward pass, or a pass in eval mode. Call "
                "optimizer.zero_grad() before each batch and keep the loss a function of outputs."
            )
        sums = clipped_sum(tape, self.max_grad_norm, scale=tape.batch, real=real).sums
        for p in self.params:
            total = sums.get(self._names[id(p)])
            total = torch.zeros_like(p) if total is None else total.to(p.dtype).view_as(p)
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients: to None always, so that one made around the clipping shows."""
        super().zero_grad(True)  # type: ignore[misc]

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        self.clip_and_accumulate()
        self._is_last_step_skipped = not self._last
        if not self._last:
            return False
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        return True

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        self._open = True
        try:
            return super().step(closure)  # type: ignore[misc]
        finally:
            self._open = False


class BookKeepingOptimizer(_BookKeeping, DPOptimizer):
    """One process."""


class DistributedBookKeepingOptimizer(_BookKeeping, DistributedDPOptimizer):
    """Several processes: noise on the first, a sum over all, as Opacus does it."""


def private_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    training: PrivateTraining,
    *,
    distributed: bool,
    **settings: Any,
) -> DPOptimizer:
    """Return the private optimizer around `optimizer`; settings are Opacus's."""
    kind = DistributedBookKeepingOptimizer if distributed else BookKeepingOptimizer
    private = kind(optimizer, **settings)
    private.watch(model, training)
    return private
