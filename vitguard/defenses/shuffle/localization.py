"""Dense absolute localization: tokens that were not shuffled must tell where they stand."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from vitguard.errors import expected

__all__ = ["Head", "LocalizationHead", "coordinates", "dal_weight", "localization_loss"]

Head = Literal["linear", "mlp", "pca"]


def coordinates(
    grid: tuple[int, int], *, device: torch.device | None = None
) -> Float[Tensor, "patches 2"]:
    """Return (row, column) of each patch, each scaled to [0, 1]."""
    lines = [torch.arange(n, device=device) / max(n - 1, 1) for n in grid]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, 1)


class LocalizationHead(nn.Module):
    """Predict (row, column) of each vector: `linear` D to 2, or `mlp` D to D, ReLU, to 2."""

    def __init__(
        self, width: int, kind: Literal["linear", "mlp"], generator: torch.Generator
    ) -> None:
        super().__init__()
        hidden = [_linear(width, width, generator), nn.ReLU()] if kind == "mlp" else []
        self.layers = nn.Sequential(*hidden, _linear(width, 2, generator))

    def forward(self, vectors: Float[Tensor, "... width"]) -> Float[Tensor, "... 2"]:
        return self.layers(vectors)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer as torch starts it, but from this generator."""
    layer: Any = skip_init(nn.Linear, inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            values = torch.rand(parameter.shape, generator=generator, device=generator.device)
            parameter.copy_((2 * values - 1) * bound)
    return layer


def localization_loss(
    vectors: Float[Tensor, "batch patches width"],
    kept: Bool[Tensor, "batch patches"],
    grid: tuple[int, int],
    head: nn.Module | None,
) -> Float[Tensor, " batch"]:
    """Return each example's mean L1 error of the coordinates over its `kept` patches.

    An example without any gives 0. No example's loss depends on another's vectors.

    Args:
        vectors: Position embeddings or output tokens of the patches.
        kept: Patches that were not shuffled.
        head: Predicts coordinates; None for principal components (`pca`).
    """
    target = coordinates(grid, device=vectors.device).to(vectors.dtype)
    weight = kept.to(vectors.dtype)
    predicted = _principal(vectors, weight, target) if head is None else head(vectors)
    error = (predicted - target).abs().sum(-1)
    return (error * weight).sum(1) / weight.sum(1).clamp_min(1)


def _principal(vectors: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Predict from the two strongest principal components, fitted to the coordinates.

    Components have no sign, order or scale of their own: least squares gives them one. Directions
    and fit are constants of the gradient, so no singular vector is ever differentiated.
    """
    share = weight / weight.sum(1, keepdim=True).clamp_min(1)
    centred = vectors - (share[..., None] * vectors).sum(1, keepdim=True)
    with torch.no_grad():
        kept = (centred * weight[..., None]).detach().float()
        _, strongest = torch.linalg.eigh(kept @ kept.mT)
        directions = F.normalize(kept.mT @ strongest[..., -2:], dim=1)
        scores = kept @ directions
        design = torch.cat([scores, weight.float()[..., None]], dim=-1)
        wanted = target.float() * weight.float()[..., None]
        normal = design.mT @ design
        ridge = 1e-6 * torch.eye(3, device=design.device)
        scale = normal.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-12)
        fit = torch.linalg.solve(normal + scale * ridge, design.mT @ wanted).to(vectors.dtype)
    return (centred @ directions.to(vectors.dtype)) @ fit[:, :2] + fit[:, 2:]


def dal_weight(step: int, *, weight: float, final: float, warmup: int, steps: int) -> float:
    """Return the weight: linear from 0 over `warmup`, then along a cosine to `final` at `steps`.

    With `steps` 0 it stays at `weight`.
    """
    if step < warmup:
        return weight * (step + 1) / warmup
    if not steps:
        return weight
    if steps <= warmup:
        raise expected(f"more steps than the {warmup} of the warm-up", steps)
    done = min(1.0, (step - warmup) / (steps - warmup))
    return final + (weight - final) * (1 + math.cos(math.pi * done)) / 2
