"""What the readers of all libraries share."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitguard.core.parameters import canonical_name

__all__ = [
    "centres",
    "classes_of",
    "convolution_obstacles",
    "has_norm",
    "pair",
    "present",
]


def classes_of(*heads: nn.Module | None) -> int:
    """Return the outputs of the last linear layer of the first head that has one, 0 without."""
    for head in heads:
        layers = [m for m in head.modules() if isinstance(m, nn.Linear)] if head else []
        outputs = int(getattr(head, "out_features", 0) or 0)
        if layers or outputs:
            return outputs or int(layers[-1].out_features)
    return 0


def pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def has_norm(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def centres(norm: nn.Module | None) -> bool:
    return "rms" not in type(norm).__name__.lower()


def convolution_obstacles(convolution: nn.Conv2d) -> list[str]:
    if tuple(convolution.kernel_size) != tuple(convolution.stride):
        return ["patches overlap: the patch convolution's stride is not its kernel size"]
    return []


def present(model: nn.Module, *names: str) -> tuple[str, ...]:
    """Return those of `names` that a model has, also beneath an adapter of PEFT."""
    held = (*model.named_parameters(), *model.named_buffers())
    known = {canonical_name(n) for n, _ in held}
    return tuple(n for n in names if n in known)
