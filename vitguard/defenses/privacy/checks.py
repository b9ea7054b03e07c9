"""What cannot be private is refused before training, by kind of layer; see also probe.py."""

from __future__ import annotations

import math

import torch
from torch import nn

from vitguard.errors import Incompatible, expected

__all__ = [
    "check_mechanism",
    "check_model",
    "checkpointing",
    "refuse_checkpointing",
    "refuse_half",
    "refuse_sharded",
]


def check_mechanism(epsilon: float | None, noise: float | None, delta: float, clip: float) -> None:
    """Raise InputError for settings of a Gaussian mechanism that are out of range."""
    if epsilon is not None and noise is not None:
        raise expected("epsilon or noise", "both", "Drop one: the other follows from it.")
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise expected("a finite epsilon above 0", epsilon)
    if not 0 < delta < 1:
        raise expected("delta in (0, 1)", delta)
    if not 0 < clip < math.inf:
        raise expected("a finite clip above 0", clip)
    if noise is not None and not 0 <= noise < math.inf:
        raise expected("a finite noise multiplier of at least 0", noise)


def check_model(model: nn.Module) -> None:
    """Raise Incompatible for layers and settings under which no example has its own gradient."""
    _refuse_wrappers(model)
    refuse_sharded(model)
    refuse_checkpointing(model)
    refuse_half(model)
    for name, module in model.named_modules():
        where = f"{type(module).__name__} at {name or 'the root'}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise Incompatible(
                f"Expected layers that treat each example alone, got {where}. Its batch statistics "
                "mix examples: replace it, for instance by GroupNorm or LayerNorm."
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise Incompatible(f"Expected no running statistics of images, got {where}.")
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
        raise Incompatible(
            "Expected a model with trainable parameters, got one that is frozen whole. Unfreeze "
            "what is trained: parameter.requires_grad_(True)."
        )


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


def refuse_half(model: nn.Module) -> None:
    """Raise Incompatible where what is trained has 16 bits: a model may be converted later."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise Incompatible(
                f"Expected trainable parameters in float32 or float64, got {name} in "
                f"{parameter.dtype}: clipped sums rounded to it move by more than the clip. Keep "
                "the parameters in float32 and train under torch.autocast(device, torch.bfloat16)."
            )


def refuse_checkpointing(model: nn.Module) -> None:
    """Raise Incompatible where a switch of timm or transformers asks for activation checkpoints."""
    for name, module in model.named_modules():
        switches = (vars(module).get(f"{word}_checkpointing") for word in ("grad", "gradient"))
        if any(switches):
            raise checkpointing(f"{type(module).__name__} at {name or 'the root'}")


def checkpointing(where: str) -> Incompatible:
    return Incompatible(
        f"Expected activations to be kept, got activation checkpointing in {where}: its second "
        "forward pass is not recorded. Turn it off and set physical_batch instead."
    )


def refuse_sharded(model: nn.Module) -> None:
    """Raise Incompatible where FSDP spreads parameters over processes, in a pass or out of one."""
    kinds = {c.__name__ for kind in {type(m) for m in model.modules()} for c in kind.__mro__}
    if "FSDPModule" in kinds or any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise Incompatible(
            "Expected whole parameters under differential privacy, got a model spread over "
            "processes by FSDP: an example's gradient is clipped over all of them. Use "
            "DistributedDataParallel, or plain copies of the model in a process group."
        )
