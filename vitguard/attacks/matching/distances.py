"""Distances between a dummy update and the seen one, each with its own derivative.

A matching attack needs the derivative of a distance by the dummy update, nothing more: it is the
cotangent that goes back through the dummy update to the images. Written out by hand it costs one
pass over the parameters; recorded by autograd it costs several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitguard.errors import expected

__all__ = ["Cosine", "Distance", "attach", "attached", "LayerNorms", "SquaredError", "Weighted"]

Tensors = Mapping[str, Tensor]
_TINY = 1e-15


class Distance(ABC):
    """A number that is smallest where the dummy update equals the seen one."""

    @abstractmethod
    def measure(self, dummy: Tensors, seen: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the distance (a scalar) and its derivative by each tensor of `dummy`.

        Args:
            dummy, seen: Tensors of equal names and shapes; no graph is kept.
        """


@dataclass(frozen=True)
class SquaredError(Distance):
    """Σ (g' - g)² over all tensors together (DLG, arXiv 1906.08935, equation 4)."""

    def measure(self, dummy: Tensors, seen: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Distance.measure`."""
        gaps = _gaps(dummy, seen)
        value = torch.stack([gap.square().sum() for gap in gaps]).sum()
        return value, dict(zip(dummy, torch._foreach_mul(gaps, 2.0), strict=True))


@dataclass(frozen=True)
class LayerNorms(Distance):
    """Σ_layers ‖g'_l - g_l‖₂, each tensor's own norm (GradInversion and GradViT, their L2 term)."""

    def measure(self, dummy: Tensors, seen: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Distance.measure`; the derivative at an exactly matched tensor is 0."""
        gaps = _gaps(dummy, seen)
        norms = torch._foreach_norm(gaps)
        slopes = [gap / norm.clamp_min(_TINY) for gap, norm in zip(gaps, norms, strict=True)]
        return torch.stack(list(norms)).sum(), dict(zip(dummy, slopes, strict=True))


@dataclass(frozen=True)
class Cosine(Distance):
    """1 - cos(g', g) over all tensors together (Inverting Gradients, arXiv 2003.14053, section 4).

    Blind to the length of the update, hence to clipping. It is 1 where either update is zero.
    """

    def measure(self, dummy: Tensors, seen: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Distance.measure`."""
        mine, theirs = list(dummy.values()), [seen[name] for name in dummy]
        dot = torch.stack(
            [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(mine, theirs, strict=True)]
        ).sum()
        length = torch.stack(torch._foreach_norm(mine)).norm().clamp_min(_TINY)
        product = (length * torch.stack(torch._foreach_norm(theirs)).norm()).clamp_min(_TINY**2)
        # d(1 - cos) = -(g - g' <g', g> / |g'|²) / (|g'| |g|)
        slopes = torch._foreach_add(theirs, mine, alpha=-(dot / length.square()).item())
        torch._foreach_mul_(slopes, -(1 / product).item())
        return 1 - dot / product, dict(zip(dummy, slopes, strict=True))


@dataclass(frozen=True)
class Weighted(Distance):
    """Σ weight · distance, each distance over some of the names (all of them where None).

    A part none of whose names is there adds nothing.
    """

    parts: tuple[tuple[float, Distance, frozenset[str] | None], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise expected("one weighted distance or more", "none")

    def measure(self, dummy: Tensors, seen: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Distance.measure`."""
        total = next(iter(dummy.values())).new_zeros(())
        slopes = {name: torch.zeros_like(tensor) for name, tensor in dummy.items()}
        for weight, distance, names in self.parts:
            chosen = {k: v for k, v in dummy.items() if names is None or k in names}
            if not chosen:
                continue
            value, part = distance.measure(chosen, seen)
            total = total + weight * value
            for name, slope in part.items():
                slopes[name].add_(slope, alpha=weight)
        return total, slopes


def attach(distance: Distance, dummy: Tensors, seen: Tensors) -> Tensor:
    """Return the distance as a scalar on the graph of `dummy`, with its hand-written derivative."""
    with torch.no_grad():
        value, slopes = distance.measure({k: v.detach() for k, v in dummy.items()}, seen)
    return attached(value, [slopes[k] for k in dummy], list(dummy.values()))


def attached(value: Tensor, slopes: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Return `value` on the graph of `inputs`, with the derivative `slopes` by each of them."""
    return _Attached.apply(value, list(slopes), *inputs)  # type: ignore[return-value]


class _Attached(torch.autograd.Function):
    """A known value with known derivatives."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slopes: list[Tensor], *dummy: Tensor) -> Tensor:
        ctx.slopes = slopes
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        scale = float(slope)
        slopes = ctx.slopes if scale == 1 else torch._foreach_mul(ctx.slopes, scale)
        return None, None, *slopes


def _gaps(dummy: Tensors, seen: Tensors) -> tuple[Tensor, ...]:
    return torch._foreach_sub(list(dummy.values()), [seen[name] for name in dummy])
