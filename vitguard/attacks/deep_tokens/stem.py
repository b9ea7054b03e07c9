"""The public blocks below: from an image to what enters the MLP of a later block, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitguard.attacks.budget import Budget, charge, nominal
from vitguard.attacks.equations.linear import least_squares
from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.core import View
from vitguard.vit import Anatomy, math_attention

__all__ = ["ROUGH", "Stem"]

ROUGH = 0.1  # error of the tokens, relative, that a first fit allows for
_FINER = 0.3  # of each further fit, in terms of the one before
_LEAST = 1e-8
_BARELY = 0.7  # of the miss before: a fit that misses more than this ends the search
_STEPS, _INNER = 3, 100  # of a fit, and iterations of each
_SETTLED = 0.03  # share of the cost that a step has to take away
_SHORTEST = 0.05  # of a step
_ATTENTION = 0.4  # of a block's work
_FORTH, _BACK = 4.0, 2.0  # passes that a product with the derivative and its adjoint take
_AT_ONCE = 16  # images of the prior


class _Reached(Exception):
    """The layer that was asked for has its input."""


@dataclass(eq=False)
class Stem:
    """The model up to the MLP of one block, in float64.

    Args:
        view: What is attacked.
        number: Of the block.
        model: A copy in float64 and eval mode.
        prior: Of images.
    """

    view: View
    anatomy: Anatomy
    number: int
    model: nn.Module = field(init=False)
    prior: NaturalImages = field(init=False)

    def __post_init__(self) -> None:
        import copy

        self.model = copy.deepcopy(self.view.model).double().eval()
        self.prior = NaturalImages.of(self.view, self.anatomy)

    def work(self, passes: float) -> dict[str, float]:
        """Return the work of so many passes of one image through the blocks below."""
        count = sum(p.numel() for p in self.model.parameters())
        below = (self.number + _ATTENTION) / len(self.anatomy.blocks)
        return {
            "products": 2.0 * passes * count * below * self.anatomy.tokens,
            "calls": 50.0 * passes * (self.number + 1),
        }

    @property
    def fit_seconds(self) -> float:
        """Nominal seconds of one rough fit."""
        return nominal(**self.work(_STEPS * _INNER * (_FORTH + _BACK)))

    def tokens(
        self, images: Float[Tensor, "n channels height width"]
    ) -> Float[Tensor, "n tokens features"]:
        """Return what enters the MLP for images in model-input units; differentiable."""
        held: list[Tensor] = []

        def reached(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            held.append(inputs[0])
            raise _Reached

        charge(**self.work(len(images)))
        layer = self.anatomy.blocks[self.number].fc1
        handle = self.model.get_submodule(layer).register_forward_pre_hook(reached)
        try:
            self.model(images)
        except _Reached:
            pass
        finally:
            handle.remove()
        return held[0]

    def natural(self, count: int, generator: torch.Generator) -> Float[Tensor, "n tokens features"]:
        """Return the tokens of images drawn from the prior."""
        made = []
        for some in torch.arange(count).split(_AT_ONCE):
            draws = torch.randn(len(some), *self.view.image_shape, generator=generator).double()
            images = torch.stack([self.image(white.to(self.prior.mean)) for white in draws])
            pixels = self.view.normalization.invert(images).clamp(0, 1)
            with torch.no_grad():
                made.append(self.tokens(self.view.normalization.apply(pixels)))
        return torch.cat(made)

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
        budget: Budget,
        *,
        start: Float[Tensor, "c h w"] | None = None,
        down_to: float = _LEAST,
    ) -> Float[Tensor, "c h w"]:
        """Return the coordinates of the image whose tokens are these, where they are known.

        Gauss-Newton under the natural-image prior, without a Jacobian in memory. The tokens are
        taken as less and less wrong, so that the prior gives way, until that brings them no nearer.

        Args:
            start: Coordinates to start from; else the prior's mean.
            down_to: Relative error of the tokens at which to stop.
        """
        white = torch.zeros(self.view.image_shape).to(tokens) if start is None else start
        size = tokens.norm(dim=1, keepdim=True) / math.sqrt(tokens.shape[1])
        error, missed = ROUGH, math.inf
        while True:
            weight = known[:, None] / (error * size)
            white = self._fit(white, tokens, weight, budget)
            gap = float(((self.made(white) - tokens) * weight * error).norm())
            if budget.over or error <= down_to or gap > _BARELY * missed:
                return white
            error, missed = _FINER * error, gap

    def _fit(self, white: Tensor, tokens: Tensor, weight: Tensor, budget: Budget) -> Tensor:
        """Minimise the weighted miss of the tokens plus what the prior says of the image."""

        def cost(white: Tensor) -> float:
            miss = (self.made(white) - tokens) * weight
            return float(miss.square().sum() + white.square().sum())

        before = cost(white)
        for _ in range(_STEPS):
            move = self._step(white, tokens, weight, budget)
            length = 1.0
            while (after := cost(white + length * move)) >= before and length > _SHORTEST:
                length /= 2
            if not after < before:
                break
            white, gain, before = white + length * move, 1 - after / before, after
            if budget.over or gain < _SETTLED:
                break
        return white

    def _step(self, white: Tensor, tokens: Tensor, weight: Tensor, budget: Budget) -> Tensor:
        """Return the step to the least of what `_fit` minimises, the tokens taken as linear."""
        leaf = white.detach().clone().requires_grad_()
        with math_attention(), torch.enable_grad():
            made = self.tokens(self.image(leaf)[None])[0] * weight
            blank = torch.zeros_like(made, requires_grad=True)
            (slope,) = torch.autograd.grad(made, leaf, blank, create_graph=True)

        def forth(v: Tensor) -> Tensor:
            charge(**self.work(_FORTH))
            (moved,) = torch.autograd.grad(slope, blank, v, retain_graph=True)
            return torch.cat([moved.flatten(), v.flatten()])

        def back(u: Tensor) -> Tensor:
            charge(**self.work(_BACK))
            miss, own = u.split([made.numel(), white.numel()])
            (pulled,) = torch.autograd.grad(made, leaf, miss.view_as(made), retain_graph=True)
            return pulled + own.view_as(white)

        miss = tokens * weight - made.detach()
        rest = torch.cat([miss.flatten(), -white.flatten()])
        return least_squares(forth, back, rest, iterations=_INNER, budget=budget, enough=1e-3)
