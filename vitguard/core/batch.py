"""A batch, and how pixels become a model's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.errors import expected

__all__ = ["Batch", "Loss", "Normalization"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Images as the model takes them (normalised), with their labels."""

    images: Float[Tensor, "batch channels height width"]
    labels: Tensor


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation between pixels in [0, 1] and model input."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise expected("as many means as standard deviations", f"{self.mean} and {self.std}")
        # 2 leaves room for inputs that are only scaled; of pixels in [0, 1] none exceeds 0.5
        if not (all(0 <= m <= 1 for m in self.mean) and all(0 < s <= 2 for s in self.std)):
            raise expected(
                "means in [0, 1] and standard deviations in (0, 2], for pixels in [0, 1]",
                f"{self.mean} and {self.std}",
                "Divide those of pixels in 0 to 255 by 255.",
            )

    def apply(self, pixels: Tensor) -> Tensor:
        """Map pixels in [0, 1], shape (..., channels, height, width), to model input.

        Raises:
            InputError: They have other channels, or are no floating-point numbers.
        """
        return (pixels - self._column(self.mean, pixels)) / self._column(self.std, pixels)

    def invert(self, images: Tensor) -> Tensor:
        """Map model input back to pixels; values outside [0, 1] are kept."""
        return images * self._column(self.std, images) + self._column(self.mean, images)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        channels = like.shape[-3] if like.dim() >= 3 else 0
        # torch would spread one channel over several means, and round means to whole numbers
        if len(values) not in (1, channels) or not like.is_floating_point():
            raise expected(
                f"floating-point images of {len(values)} channels, shape (..., {len(values)}, "
                "height, width)", f"{like.dtype} of shape {tuple(like.shape)}",
            )  # fmt: skip
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
