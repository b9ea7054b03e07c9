"""Priors of matching attacks: what a natural image, or a consistent ensemble, looks like.

All work on model-input images of shape (batch, channels, height, width) and return a scalar.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitguard.core import Normalization
from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = [
    "FeatureStatistics",
    "GroupConsistency",
    "PatchBorders",
    "PixelNorm",
    "Prior",
    "Scene",
    "TotalVariation",
    "register",
]

_IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Images = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True, eq=False)
class Scene:
    """What a prior may know beside the images.

    Args:
        anatomy: Of the attacked model.
        normalization: From pixels to its input.
        ensemble: Images of every restart, shape (restarts, batch, ...), without a graph.
        index: Which restart the images are.
    """

    anatomy: Anatomy
    normalization: Normalization
    ensemble: Tensor
    index: int = 0


class Prior(ABC):
    """A number that is small for plausible images."""

    @abstractmethod
    def __call__(self, images: Images, scene: Scene) -> Tensor:
        """Return the differentiable scalar."""


@dataclass(frozen=True)
class TotalVariation(Prior):
    """Jumps between neighbouring pixels: `mean` of |jump| (Inverting Gradients), or `norm`.

    `mean` is mean |Δrow| + mean |Δcolumn|; `norm` is ‖Δrow‖₂ + ‖Δcolumn‖₂ over the whole batch
    (GradInversion, GradViT).
    """

    kind: Literal["mean", "norm"] = "mean"

    def __call__(self, images: Images, scene: Scene) -> Tensor:
        """See `Prior`."""
        down = images[..., 1:, :] - images[..., :-1, :]
        across = images[..., :, 1:] - images[..., :, :-1]
        if self.kind == "mean":
            return down.abs().mean() + across.abs().mean()
        return _norm(down) + _norm(across)


@dataclass(frozen=True)
class PixelNorm(Prior):
    """‖x‖₂ over the whole batch, zero at the mean colour (GradInversion, arXiv 2104.07586)."""

    def __call__(self, images: Images, scene: Scene) -> Tensor:
        """See `Prior`."""
        return _norm(images)


@dataclass(frozen=True)
class PatchBorders(Prior):
    """Σ_borders ‖jump across the border‖₂, rows and columns (R_patch of GradViT, 2203.11894)."""

    def __call__(self, images: Images, scene: Scene) -> Tensor:
        """See `Prior`."""
        high, wide = scene.anatomy.patch_size
        rows = range(high, images.shape[-2], high)
        columns = range(wide, images.shape[-1], wide)
        jumps = [images[..., k, :] - images[..., k - 1, :] for k in rows]
        jumps += [images[..., k] - images[..., k - 1] for k in columns]
        return torch.stack([_norm(j) for j in jumps]).sum() if jumps else images.sum() * 0


@dataclass(frozen=True, eq=False)
class FeatureStatistics(Prior):
    """Σ_layers ‖mean - running mean‖₂ + ‖variance - running variance‖₂ of a CNN's batch norms.

    The image prior of DeepInversion that GradInversion and GradViT use. The network is the
    adversary's own and never the attacked model.

    Args:
        network: A pretrained CNN with BatchNorm2d layers.
        normalization: From pixels in [0, 1] to the network's input.
    """

    network: nn.Module
    normalization: Normalization = _IMAGENET

    def __post_init__(self) -> None:
        layers = [m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d)]
        if not layers or any(layer.running_mean is None for layer in layers):
            raise expected("a network with BatchNorm2d statistics", type(self.network).__name__)

    def __call__(self, images: Images, scene: Scene) -> Tensor:
        """See `Prior`."""
        like = next(self.network.parameters())
        pixels = scene.normalization.invert(images).to(like)
        with self._recorded() as gaps:
            self.network(self.normalization.apply(pixels))
        return torch.stack(gaps).sum().to(images)

    @contextmanager
    def _recorded(self) -> Iterator[list[Tensor]]:
        gaps: list[Tensor] = []

        def record(layer: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
            variance, mean = torch.var_mean(inputs[0], (0, 2, 3), unbiased=False)
            gaps.append(_norm(mean - layer.running_mean) + _norm(variance - layer.running_var))

        layers = [m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d)]
        modes = {m: m.training for m in self.network.modules()}
        hooks = [layer.register_forward_hook(record) for layer in layers]
        self.network.eval()  # the statistics must not move
        try:
            yield gaps
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes.items():
                module.training = training


@dataclass(frozen=True)
class GroupConsistency(Prior):
    """Mean squared distance to the mean of the registered ensemble (GradInversion, R_group).

    Each restart's image is shifted by whole pixels to where it agrees best with the plain ensemble
    mean; the mean of the shifted images is what every restart is drawn to. Zero with one restart.

    Args:
        reach: Largest shift, as a share of height and width.
    """

    reach: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.reach <= 0.5:
            raise expected("reach in [0, 0.5]", self.reach)

    def __call__(self, images: Images, scene: Scene) -> Tensor:
        """See `Prior`."""
        if len(scene.ensemble) < 2:
            return images.sum() * 0
        mean = scene.ensemble.mean(0)
        aligned = torch.stack([register(member, mean, self.reach) for member in scene.ensemble])
        return (images - aligned.mean(0)).square().mean()


def register(images: Images, reference: Images, reach: float = 0.25) -> Images:
    """Shift each image cyclically by the whole pixels that correlate it best with its reference."""
    height, width = images.shape[-2:]
    spectrum = torch.fft.rfft2(reference) * torch.fft.rfft2(images).conj()
    correlation = torch.fft.irfft2(spectrum, s=(height, width)).sum(1)
    near = [
        (torch.fft.fftfreq(n, 1 / n, device=images.device).abs() <= reach * n)
        for n in (height, width)
    ]
    correlation = correlation.masked_fill(~(near[0][:, None] & near[1][None]), -torch.inf)
    best = correlation.flatten(1).argmax(1).tolist()
    shifts = [divmod(b, width) for b in best]
    return torch.stack([x.roll(s, (-2, -1)) for x, s in zip(images, shifts, strict=True)])


def _norm(values: Tensor) -> Tensor:
    """The Euclidean norm with derivative 0, not NaN, at zero."""
    return torch.linalg.vector_norm(values)
