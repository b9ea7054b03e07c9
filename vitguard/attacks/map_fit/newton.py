"""Gauss-Newton on likelihood and prior, in coordinates in which the prior is standard normal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import Budget, charge, charge_update
from vitguard.attacks.equations.linear import conjugate_gradients
from vitguard.attacks.equations.update_jacobian import Simulate, UpdateJacobian
from vitguard.attacks.map_fit.likelihood import Likelihood, Misfit
from vitguard.attacks.map_fit.shuffled_images import ShuffledImages
from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.core import View
from vitguard.errors import NotApplicable

__all__ = ["Fit", "normal_equations"]

White = Float[Tensor, "batch channels height width"]
Operator = Callable[[Tensor], Tensor]

_SHORTEST = 0.05  # of a Gauss-Newton step
_SETTLED = 1e-3  # gain of a step, relative to the objective, below which no further one is taken
_FIRST, _MORE = 20, 10  # iterations of the first step, and more of each further one: early ones
# are careful where the update is far from linear
_LOOSE = 0.05  # how exactly a step is solved for


@dataclass(eq=False)
class Fit:
    """The search for the most probable images.

    Args:
        view: What is attacked.
        prior: Of its images.
        simulate: From model-input images to the tensors that are compared.
        likelihood: Of the seen tensors.
        white: Where it stands.
    """

    view: View
    prior: NaturalImages | ShuffledImages
    simulate: Simulate
    likelihood: Likelihood
    white: White
    steps: int = 0
    products: int = 0
    watch: Callable[[Fit], None] | None = None
    _last: Misfit | None = None

    def images(self, white: White) -> Tensor:
        """Return model-input images in float64."""
        return self.prior.anatomy.unpatchify(self.prior.colour(white))

    def run(self, budget: Budget, *, steps: int, inner: int) -> bool:
        """Take Gauss-Newton steps; return whether they settled before budget or count ended."""
        misfit, levels = self._begin()
        self._last = misfit
        for _ in range(steps):
            if budget.over:
                return False
            slope = UpdateJacobian.at(
                self.view, self.images(self.white), self.likelihood.names, self.simulate
            )
            operator, right = normal_equations(
                slope, self.prior, misfit, levels, self.white, self._count
            )
            if not bool(right.isfinite().all()):
                raise NotApplicable("the simulated update has no finite derivative")
            move = conjugate_gradients(
                operator, right, iterations=min(inner, _FIRST + _MORE * self.steps),
                tolerance=_LOOSE, budget=budget,
            )  # fmt: skip
            before = self._objective(self.white, misfit, levels)
            length = 1.0
            while length > _SHORTEST:
                white = self.white + length * move
                trial = self.likelihood.misfit(self._made(white), levels)
                after = self._objective(white, trial, levels)
                if after < before:
                    break
                length /= 2
            else:
                return not budget.over
            self.white, misfit = white, trial
            self._last = misfit
            self.steps += 1
            levels = self.likelihood.levels(misfit)
            if self.watch is not None:
                self.watch(self)
            if before - after < _SETTLED * before:
                return not budget.over
        return False

    @property
    def scale(self) -> float:
        """The unknown scale of the update, as it fits best."""
        return 1.0 if self._last is None else self._last.scale

    @property
    def discrepancy(self) -> float | None:
        """Squared misfit over what the known noise explains; None where no level is known."""
        return None if self._last is None else self.likelihood.discrepancy(self._last)

    @property
    def reached(self) -> bool:
        """Whether the misfit is no larger than the known noise makes it."""
        ratio, entries = self.discrepancy, sum(t.numel() for t in self.likelihood.seen)
        return ratio is not None and ratio < 1 + 3 * (2 / entries) ** 0.5

    def _count(self) -> None:
        self.products += 1

    def _made(self, white: White) -> list[Tensor]:
        images = self.images(white).to(next(self.view.model.parameters()))
        charge_update(self.view)
        made = self.simulate(images)
        return [made[name].detach() for name in self.likelihood.names]

    def _begin(self) -> tuple[Misfit, list[float]]:
        made = self._made(self.white)
        misfit = self.likelihood.misfit(made, self.likelihood.sizes)
        for _ in range(3):  # the scale and the levels, in turn
            levels = self.likelihood.levels(misfit)
            misfit = self.likelihood.misfit(made, levels)
        return misfit, self.likelihood.levels(misfit)

    def _objective(self, white: White, misfit: Misfit, levels: list[float]) -> float:
        squares = zip(misfit.squares(), levels, strict=True)
        return sum(q / level**2 for q, level in squares) + float(white.square().sum())


def normal_equations(
    slope: UpdateJacobian,
    prior: NaturalImages | ShuffledImages,
    misfit: Misfit,
    levels: list[float],
    white: White,
    count: Callable[[], None] = lambda: None,
) -> tuple[Operator, White]:
    """Return v -> (1 + A^T A) v and A^T rest - white, A the weighted derivative by `white`.

    The unknown scale is eliminated: A leaves out what only rescales the update, which is the
    Gauss-Newton matrix of the problem with the best scale put in (Kaufman 1975).
    """
    factors = [misfit.scale / level for level in levels]
    along = [f * _masked(m, a) for f, m, a in zip(factors, slope.made, misfit.active, strict=True)]
    power = _inner(along, along)

    def straight(parts: list[Tensor]) -> list[Tensor]:
        if power <= 0:
            return parts
        share = _inner(along, parts) / power
        return [p - share * a for p, a in zip(parts, along, strict=True)]

    def back(parts: list[Tensor]) -> Tensor:
        weighted = [
            f * _masked(p, a) for f, p, a in zip(factors, parts, misfit.active, strict=True)
        ]
        return prior.unpaint(slope.back(weighted).double())

    def operator(v: Tensor) -> Tensor:
        count()
        moved = slope.forth(prior.paint(v))
        parts = [f * _masked(m, a) for f, m, a in zip(factors, moved, misfit.active, strict=True)]
        charge(elements=0.5 * sum(p.numel() for p in parts), calls=8.0 * len(parts))
        return v + back(straight(parts))

    rest = [r / level for r, level in zip(misfit.rest, levels, strict=True)]
    return operator, back(straight(rest)) - white


def _masked(tensor: Tensor, active: Tensor | None) -> Tensor:
    return tensor if active is None else tensor * active


def _inner(one: list[Tensor], other: list[Tensor]) -> float:
    parts = [(a * b).sum(dtype=torch.float64) for a, b in zip(one, other, strict=True)]
    return float(torch.stack(parts).sum())
