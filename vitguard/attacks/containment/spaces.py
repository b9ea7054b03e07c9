"""The row spaces that a low-rank update shows, and how far the inputs of an image miss them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor, nn

from vitguard.attacks.budget import charge, nominal
from vitguard.core import View
from vitguard.errors import Blocked, NotApplicable
from vitguard.vit import Anatomy, math_attention

__all__ = ["RowSpaces"]

_FAINT = 1e-5  # of the largest singular value, below which a row is rounding
_AT_ONCE = 64  # directions of the Jacobian


@dataclass(eq=False)
class RowSpaces:
    """V_t of every linear layer t whose inputs leave a complement, in float64.

    Args:
        rank: Rows of each layer at most.
        keep: Equations at most: a random part of them is kept.
    """

    view: View
    anatomy: Anatomy
    rank: int
    keep: int
    generator: torch.Generator
    rows: dict[str, Tensor] = field(default_factory=dict)
    picks: dict[str, Tensor] = field(default_factory=dict)
    total: int = 0

    def __post_init__(self) -> None:
        self.model: nn.Module = copy.deepcopy(self.view.model).double().eval()
        patch = self.anatomy.patch_weight.rpartition(".")[0]
        layers = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        names = [n for n in (patch, *layers) if self.view.update.can_read(f"{n}.weight")]
        if not names:
            raise Blocked(self.anatomy.patch_weight, "no weight of a layer can be read")
        self.patch = patch
        sizes = {}
        for name, inputs in self.inputs(self._flat()).items():
            tokens, width = inputs.shape[1:]
            if name not in names or tokens >= width:
                continue
            weight = self.view.read(f"{name}.weight").flatten(1)
            charge(svd=weight.numel() * min(weight.shape))
            _, values, vectors = torch.linalg.svd(weight, full_matrices=False)
            strong = int((values > _FAINT * values[0]).sum())
            if strong:
                self.rows[name] = vectors[: min(self.rank, strong)]
                sizes[name] = len(self.rows[name]) * (width - min(tokens, width))
        if not self.rows:
            raise NotApplicable("the tokens fill the spans of every layer that can be read")
        self.total = sum(sizes.values())
        share = min(1.0, self.keep / self.total)
        for name, rows in self.rows.items():
            draw = torch.rand(rows.shape, generator=self.generator) < share
            self.picks[name] = draw.flatten().nonzero()[:, 0].to(rows.device)

    def _flat(self) -> Tensor:
        like = next(self.model.parameters())
        return torch.zeros(1, *self.view.image_shape, dtype=like.dtype, device=like.device)

    @property
    def jacobian_seconds(self) -> float:
        """Nominal seconds of one Jacobian and its normal equations."""
        pixels = self._flat().numel()
        count = sum(p.numel() for p in self.model.parameters())
        return pixels * nominal(
            products=6.0 * count * self.anatomy.tokens + 2.0 * self.keep * pixels,
            calls=4.0,
        )

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return the inputs of each linear layer, (images, tokens, width), by its name."""
        held: dict[str, Tensor] = {}

        def reading(name: str):  # type: ignore[no-untyped-def]
            def read(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                held[name] = given[0].reshape(len(given[0]), -1, given[0].shape[-1])

            return read

        layers = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_pre_hook(reading(n)) for n, m in layers]
        try:
            with math_attention():
                self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        return {self.patch: self.anatomy.patchify(images), **held}

    def missed(self, image: Float[Tensor, "c h w"]) -> Float[Tensor, " equations"]:
        """Return V - V L^+ L of all layers."""
        charge(elements=0.0, calls=300)
        with torch.no_grad():
            inputs = self.inputs(image[None])
        return torch.cat(
            [
                self._apart(rows, inputs[n][0])[0].flatten()[self.picks[n]]
                for n, rows in self.rows.items()
            ]
        )

    def jacobian(
        self, image: Float[Tensor, "c h w"], directions: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n equations"]:
        """Return the derivative of `missed` along directions, V L^+ held (Kaufman)."""
        with torch.no_grad():
            fixed = {
                n: self._apart(self.rows[n], t[0])
                for n, t in self.inputs(image[None]).items()
                if n in self.rows
            }
        parts = []
        for some in directions.split(_AT_ONCE):
            count = sum(p.numel() for p in self.model.parameters())
            charge(products=6.0 * count * self.anatomy.tokens * len(some), calls=400.0)
            with forward_ad.dual_level(), torch.no_grad():
                images = image.expand(len(some), -1, -1, -1).contiguous()
                inputs = self.inputs(forward_ad.make_dual(images, some.contiguous()))
                row = []
                for name in self.rows:
                    moved = forward_ad.unpack_dual(inputs[name]).tangent
                    if moved is None:
                        raise NotApplicable(f"the inputs of {name} cannot be differentiated")
                    _, mix, basis = fixed[name]
                    part = mix @ moved
                    part = part - (part @ basis) @ basis.T
                    row.append(-part.flatten(1)[:, self.picks[name]])
            parts.append(torch.cat(row, 1))
        return torch.cat(parts)

    @staticmethod
    def _apart(rows: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return V - V L^+ L, V L^+, and a basis of the rows of L."""
        charge(svd=inputs.numel() * min(inputs.shape))
        left, values, basis = torch.linalg.svd(inputs, full_matrices=False)
        solid = values > 1e-10 * values[0]
        left, values, basis = left[:, solid], values[solid], basis[solid]
        along = rows @ basis.T
        return rows - along @ basis, (along / values) @ left.T, basis.T
