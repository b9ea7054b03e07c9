"""The rows that a low-rank update shows of each layer, and how far an image's inputs miss them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor, nn

from vitguard.attacks.budget import charge, nominal
from vitguard.core import View
from vitguard.errors import Blocked, NotApplicable
from vitguard.vit import Anatomy, canonical_name, math_attention

__all__ = ["RowSpaces", "adapters", "later", "missed_by"]

_FAINT = 1e3  # times the spacing of floats, of the largest singular value: a row that is rounding
_ROUNDING = 30.0  # times the spacing of floats that a row of a true gradient is off at most
_SURE = 1e-4  # what rounding may move a row of unit length, so that it counts as an equation
_FITTED = 0.8  # of the rows at most; the others are held out
_AT_ONCE = 64  # directions of the Jacobian


def adapters(names: Iterable[str], anatomy: Anatomy) -> list[str]:
    """Return the matrices that stand beside the layers of the blocks, where these send nothing.

    As those of LoRA do: a gradient dL/dA of y = (W + B A) x has rows in the span of the inputs x.
    """
    names = list(names)
    own = {f"{layer}.weight" for b in anatomy.blocks for layer in (b.proj, b.fc1, b.fc2)}
    own.update(name for b in anatomy.blocks for name in b.qkv)
    if not own.isdisjoint(names):
        return []
    matrices = (n for n in names if n.endswith(".weight") and "norm" not in n)
    return [n for n in matrices if anatomy.role(n) in ("attention", "mlp")]


def later(names: Iterable[str], anatomy: Anatomy) -> list[str]:
    """Return the matrices of the blocks, where the first one shows none of its attention.

    Frozen or hidden, it ends the attacks that solve from the patches upward. What enters a layer
    behind it is a function of the pixels all the same, and all that is below is public.
    """
    names, blocks = set(names), anatomy.blocks
    if not blocks or not names.isdisjoint((*blocks[0].qkv, f"{blocks[0].proj}.weight")):
        return []
    layers = ((*b.qkv, *(f"{n}.weight" for n in (b.proj, b.fc1, b.fc2))) for b in blocks)
    return [name for block in layers for name in block if name in names]


@dataclass(eq=False)
class RowSpaces:
    """V_t of every linear layer t whose inputs leave a complement, in float64.

    A random part of the rows is kept for the fit; the rest, a fifth or so at least, is held out:
    whoever fits the first without being at the truth misses the second. Whole rows, so that the
    derivative below is that of what is minimised.

    Args:
        rank: Rows of each layer at most; 0 where each shows as many as its shape allows.
        keep: Equations for the fit at most.
    """

    view: View
    anatomy: Anatomy
    rank: int
    keep: int
    generator: torch.Generator
    rows: dict[str, Tensor] = field(default_factory=dict)
    rounding: dict[str, Tensor] = field(default_factory=dict)
    """By layer, how much of each row, of unit length, rounding may move away; shape (rows,)."""
    free: dict[str, int] = field(default_factory=dict)
    """By layer, the equations of a row: width - tokens."""
    picks: dict[str, Tensor] = field(default_factory=dict)
    """By layer, the numbers of the rows that are fitted."""
    total: int = 0
    """Equations of all layers that are independent: rows times (width - tokens)."""
    kept: int = 0
    """Those of the rows that are fitted and that rounding leaves sure."""

    def __post_init__(self) -> None:
        self.model: nn.Module = copy.deepcopy(self.view.model).double().eval()
        self.coarse: nn.Module = copy.deepcopy(self.model).float()
        self.patch = self.anatomy.patch_weight.rpartition(".")[0]
        layers = [canonical_name(f"{n}.weight") for n in _linear(self.model)]
        names = [n for n in (self.anatomy.patch_weight, *layers) if self.view.update.can_read(n)]
        if not names:
            raise Blocked(self.anatomy.patch_weight, "no weight of a layer can be read")
        for name, inputs in self.inputs(self._flat()).items():
            tokens, width = inputs.shape[1:]
            if name in names and tokens < width:
                self._take(name, tokens)
        if not self.rows:
            raise NotApplicable(
                "no layer that can be read shows rows within a span: the tokens fill all of them, "
                "or it sends zeros (an adapter before its first step)"
            )
        share = min(_FITTED, self.keep / self.total)
        for name, rows in self.rows.items():
            draw = torch.rand(len(rows), generator=self.generator) < share
            if picks := draw.nonzero()[:, 0].tolist():
                self.picks[name] = torch.tensor(picks, device=rows.device)
                sure = self.rounding[name][self.picks[name]] <= _SURE
                self.kept += int(sure.sum()) * self.free[name]

    def _take(self, name: str, tokens: int) -> None:
        """Keep the rows of a layer that stand above its rounding."""
        seen = self.view.update.read(name)
        weight = seen.detach().double().flatten(1)
        charge(svd=weight.numel() * min(weight.shape))
        _, values, vectors = torch.linalg.svd(weight, full_matrices=False)
        spacing = torch.finfo(seen.dtype).eps
        strong = int((values > _FAINT * spacing * values[0]).sum()) if bool(values[0] > 0) else 0
        if count := min(strong, tokens, self.rank or strong):
            self.rows[name] = vectors[:count]
            self.rounding[name] = _ROUNDING * spacing * values[0] / values[:count]
            self.free[name] = weight.shape[1] - tokens
            self.total += count * self.free[name]

    def _flat(self) -> Tensor:
        like = next(self.model.parameters())
        return torch.zeros(1, *self.view.image_shape, dtype=like.dtype, device=like.device)

    @property
    def jacobian_seconds(self) -> float:
        """Nominal seconds of one Jacobian in float32 and its normal equations."""
        pixels = self._flat().numel()
        kept = sum(len(p) * self.rows[n].shape[1] for n, p in self.picks.items())
        equations = nominal(share=0.5, products=2.0 * kept * pixels**2)
        return equations + nominal(share=0.5, **self._pass(pixels))

    def _pass(self, directions: int) -> dict[str, float]:
        """Return the work of a forward pass with the derivative along so many directions."""
        count = sum(p.numel() for p in self.model.parameters())
        products = 6.0 * count * self.anatomy.tokens * directions
        return {"products": products, "calls": 400.0 * -(-directions // _AT_ONCE)}

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return the inputs of each layer, (images, tokens, width), by the name of its weight.

        Images in float32 go through a copy of the model in float32.
        """
        model = self.coarse if images.dtype == torch.float32 else self.model
        held: dict[str, Tensor] = {}

        def reading(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def read(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                held[name] = given[0].reshape(len(given[0]), -1, given[0].shape[-1])

            return read

        handles = [
            m.register_forward_pre_hook(reading(canonical_name(f"{n}.weight")))
            for n, m in _linear(model).items()
        ]
        try:
            with math_attention():
                model(images)
        finally:
            for handle in handles:
                handle.remove()
        return {self.anatomy.patch_weight: self.anatomy.patchify(images), **held}

    def missed(self, image: Float[Tensor, "c h w"]) -> dict[str, Float[Tensor, "rows width"]]:
        """Return V - V L^+ L of every layer."""
        charge(calls=300.0)
        with torch.no_grad():
            inputs = self.inputs(image[None])
        return {n: missed_by(rows, inputs[n][0])[0] for n, rows in self.rows.items()}

    def fitted(self, *, sharp: bool) -> dict[str, Float[Tensor, "rows width"]]:
        """Return the rows that are fitted, where `sharp` shorter the less rounding leaves sure."""
        found = {n: self.rows[n][picks] for n, picks in self.picks.items()}
        if not sharp:
            return found
        return {
            n: rows * (_SURE / self.rounding[n][self.picks[n]]).clamp_max(1)[:, None]
            for n, rows in found.items()
        }

    def gap(
        self, image: Float[Tensor, "c h w"], *, sharp: bool = False
    ) -> Float[Tensor, " equations"]:
        """Return what the rows that are fitted miss."""
        charge(calls=300.0)
        with torch.no_grad():
            inputs = self.inputs(image[None])
        fitted = self.fitted(sharp=sharp).items()
        return torch.cat([missed_by(rows, inputs[n][0])[0].flatten() for n, rows in fitted])

    def contained(self, image: Float[Tensor, "c h w"]) -> bool:
        """Say whether every row, those held out too, misses no more than rounding explains."""
        missed = self.missed(image)
        return all(bool((m.norm(dim=1) <= self.rounding[n]).all()) for n, m in missed.items())

    def jacobian(
        self,
        image: Float[Tensor, "c h w"],
        directions: Float[Tensor, "n c h w"],
        *,
        sharp: bool = False,
    ) -> Float[Tensor, "n equations"]:
        """Return the derivative of `gap` along directions, V L^+ held (Kaufman 1975).

        What is left out lies in the span of L and `gap` across it: slopes are exact.
        In the precision of `image` and `directions`: float32 takes half the time.
        """
        with torch.no_grad():
            at = self.inputs(image[None])
            fixed = {
                n: missed_by(rows.to(image), at[n][0])[1:]
                for n, rows in self.fitted(sharp=sharp).items()
            }
        parts = []
        for some in directions.split(_AT_ONCE):
            with forward_ad.dual_level(), torch.no_grad():
                images = image.expand(len(some), -1, -1, -1).contiguous()
                inputs = self.inputs(forward_ad.make_dual(images, some.contiguous()))
                row = []
                for name, (mix, basis) in fixed.items():
                    moved = forward_ad.unpack_dual(inputs[name]).tangent
                    if moved is None:
                        raise NotApplicable(f"the inputs of {name} cannot be differentiated")
                    part = mix @ moved
                    part = part - (part @ basis) @ basis.T
                    row.append(-part.flatten(1))
            parts.append(torch.cat(row, 1))
        share = 0.5 if image.dtype == torch.float32 else 1.0
        charge(share=share, **self._pass(len(directions)))
        return torch.cat(parts)


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def missed_by(rows: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return V - V L^+ L, V L^+, and a basis of the rows of L (tokens, width)."""
    charge(svd=inputs.numel() * min(inputs.shape))
    left, values, basis = torch.linalg.svd(inputs, full_matrices=False)
    solid = values > (1e-10 if inputs.dtype == torch.float64 else 1e-5) * values[0]
    left, values, basis = left[:, solid], values[solid], basis[solid]
    along = rows @ basis.T
    return rows - along @ basis, (along / values) @ left.T, basis.T
