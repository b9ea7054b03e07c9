"""What accelerate prepared before: the optimizer and loader of torch inside, and the way back."""

from __future__ import annotations

from typing import Any

from vitguard.errors import Incompatible

__all__ = ["opened", "put_back"]


def opened(optimizer: Any, loader: Any) -> tuple[Any, Any]:
    """Return the optimizer and loader of torch inside what `accelerator.prepare` made of them.

    Raises:
        Incompatible: Something that accelerate would do around them cannot be kept.
    """
    if _by_accelerate(optimizer):
        _refuse(optimizer, loader)
        optimizer = optimizer.optimizer
    if _by_accelerate(loader):
        loader = getattr(loader, "base_dataloader", loader)
    return getattr(optimizer, "original_optimizer", optimizer), loader


def put_back(given: Any, private: Any) -> Any:
    """Return `private`, or accelerate's own optimizer with it inside.

    So the accelerator steps and saves what is private, its ledger among the optimizer's state.
    """
    if not _by_accelerate(given):
        return private
    given.optimizer = private
    return given


def _by_accelerate(thing: Any) -> bool:
    return type(thing).__module__.startswith("accelerate.")


def _refuse(optimizer: Any, loader: Any) -> None:
    device = getattr(loader, "device", None)
    reasons = {
        "one of several processes": optimizer.accelerator_state.num_processes > 1,
        "one with a gradient scaler": optimizer.scaler is not None,
        "one that accumulates gradients": optimizer.gradient_state.num_steps != 1,
        f"one whose batches go to {device}": getattr(device, "type", "cpu") != "cpu",
    }
    if got := next((reason for reason, holds in reasons.items() if holds), ""):
        raise Incompatible(
            "Expected an optimizer of torch under differential privacy, got what "
            f"accelerator.prepare made of it, and {got}. Call "
            "vitguard.integrations.accelerate.prepare(accelerator, model, optimizer, loader) in "
            "its place."
        )
