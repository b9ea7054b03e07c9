"""The public blocks below: from an image to what enters the MLP of a later block, and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitguard.attacks.budget import Budget, charge, nominal
from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.core import View
from vitguard.vit import Anatomy, math_attention

__all__ = ["Stem"]

_ROWS = 256  # of the Jacobian at once
_SKETCH = 1.5  # equations kept for each pixel
_STEPS = 60
_STALLED = 0.3  # share of the cost that a step has to take away, else the prior gives way


class _Reached(Exception):
    """The layer that was asked for has its input."""


@dataclass(eq=False)
class Stem:
    """The model up to the MLP of one block, in float64.

    Args:
        model: A copy in float64 and eval mode.
        layer: Name of the fc1 whose inputs are read.
        prior: Of images.
    """

    view: View
    anatomy: Anatomy
    layer: str
    model: nn.Module = field(init=False)
    prior: NaturalImages = field(init=False)

    def __post_init__(self) -> None:
        import copy

        self.model = copy.deepcopy(self.view.model).double().eval()
        self.prior = NaturalImages.of(self.view, self.anatomy)

    @property
    def pass_seconds(self) -> float:
        """Nominal seconds of one image through the model, forth and back."""
        count = sum(p.numel() for p in self.model.parameters())
        return nominal(products=6.0 * count * self.anatomy.tokens, calls=200)

    @property
    def jacobian_seconds(self) -> float:
        """Nominal seconds of one Jacobian and its factorisation."""
        channels, height, width = self.view.image_shape
        pixels = channels * height * width
        return _SKETCH * pixels * self.pass_seconds + nominal(qr=_SKETCH * pixels**3)

    def tokens(
        self, images: Float[Tensor, "n channels height width"]
    ) -> Float[Tensor, "n tokens features"]:
        """Return what enters the layer for images in model-input units; differentiable."""
        held: list[Tensor] = []

        def reached(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            held.append(inputs[0])
            raise _Reached

        charge(elements=0.0, calls=100)
        handle = self.model.get_submodule(self.layer).register_forward_pre_hook(reached)
        try:
            self.model(images)
        except _Reached:
            pass
        finally:
            handle.remove()
        return held[0]

    def natural(self, count: int, generator: torch.Generator) -> Float[Tensor, "n tokens features"]:
        """Return the tokens of images drawn from the prior."""
        draws = torch.randn(count, *self.view.image_shape, generator=generator).double()
        like = self.prior.mean
        images = torch.stack([self.image(white.to(like)) for white in draws])
        pixels = self.view.normalization.invert(images).clamp(0, 1)
        with torch.no_grad():
            return self.tokens(self.view.normalization.apply(pixels))

    def made(self, white: Float[Tensor, "c h w"]) -> Float[Tensor, "tokens features"]:
        """Return the tokens of the image of these coordinates."""
        with torch.no_grad():
            return self.tokens(self.image(white)[None])[0]

    def image(self, white: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        """Return the image (model-input units) of coordinates of the prior."""
        return self.anatomy.unpatchify(self.prior.colour(white))

    def invert(
        self,
        tokens: Float[Tensor, "tokens features"],
        known: Tensor,
        whiten: Float[Tensor, "features features"],
        budget: Budget,
        generator: torch.Generator,
        *,
        start: Tensor | None = None,
        weight: float = 1.0,
        down_to: float = 1e-13,
    ) -> Float[Tensor, "c h w"]:
        """Return the coordinates of the image whose tokens are these, where they are known.

        Levenberg-Marquardt on a random part of the equations under the natural-image prior, which
        gives way to the equations step by step. A Jacobian serves as long as its steps do well.

        Args:
            start: Coordinates to start from.
            weight: Of the prior at the start.
            down_to: Weight of the prior below which to stop.
        """
        white = torch.zeros(self.view.image_shape).to(tokens) if start is None else start
        pixels = white.numel()
        mix = whiten
        equations = int(known.sum()) * mix.shape[1]
        rows = torch.randperm(equations, generator=generator)[: int(_SKETCH * pixels)]
        rows = rows.sort().values.to(tokens.device)

        def missed(white: Tensor) -> Tensor:
            charge(elements=0.0, calls=1)
            made = self.tokens(self.image(white)[None])[0]
            return ((made - tokens)[known] @ mix).flatten()[rows]

        prior, damping, hessian = weight, weight, None
        gap = missed(white).detach()
        eye = torch.eye(pixels).to(tokens)
        for _ in range(_STEPS):
            if budget.over:
                break
            if hessian is None:
                jacobian = self._jacobian(missed, white)
                hessian = jacobian.T @ jacobian
            cost = float(gap.square().sum() + prior * white.square().sum())
            slope = jacobian.T @ gap + prior * white.flatten()
            charge(qr=pixels**3 / 3, products=2.0 * jacobian.numel())
            step = torch.linalg.solve(hessian + (prior + damping) * eye, slope)
            trial = white - step.view_as(white)
            with torch.no_grad():
                new = missed(trial)
            gain = 1 - float(new.square().sum() + prior * trial.square().sum()) / max(cost, 1e-300)
            if gain > 0:
                white, gap, damping = trial, new, max(0.2 * damping, 1e-14)
            else:
                damping *= 8
            if 0 < gain < 0.9:
                hessian = None
            if 0 < gain < _STALLED:
                if prior < down_to:
                    break
                prior *= 0.1
            elif damping > 1e9:
                break
        return white

    def _jacobian(self, missed, white: Tensor) -> Float[Tensor, "rows pixels"]:  # type: ignore[no-untyped-def]
        leaf = white.clone().requires_grad_()
        with math_attention(), torch.enable_grad():
            gap = missed(leaf)
            parts = []
            for some in torch.arange(len(gap), device=gap.device).split(_ROWS):
                charge(elements=0.0, calls=200 * len(some))
                pick = torch.zeros(len(some), len(gap)).to(gap)
                pick[torch.arange(len(some)), some] = 1
                (part,) = torch.autograd.grad(
                    gap, leaf, pick, is_grads_batched=True, retain_graph=True
                )
                parts.append(part.flatten(1))
        return torch.cat(parts)
