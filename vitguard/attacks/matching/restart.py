"""One start of a matching attack: its free variables, its optimizer and its best so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vitguard.attacks.matching.distances import Distance
from vitguard.attacks.matching.priors import Prior
from vitguard.attacks.matching.subspace import Subspace
from vitguard.errors import expected

__all__ = ["EVALUATIONS", "Recipe", "Restart", "Schedule", "at"]

EVALUATIONS = 20
"""Inner iterations of one L-BFGS step, torch's default."""

Schedule = tuple[tuple[float, float], ...]
"""Values by the share of the iterations from which each holds: ((0, 4e-3), (0.5, 2e-3))."""


def at(schedule: Schedule, share: float) -> float:
    """Return the value that holds at `share` of the run; 0 before the first."""
    return next((value for start, value in reversed(schedule) if share >= start), 0.0)


@dataclass(frozen=True)
class Recipe:
    """A paper: distance, priors, optimizer and schedules.

    Args:
        distance: Between the dummy and the seen update.
        weight: Of the distance.
        priors: Each with its name and weight over the run.
        optimizer, rate, decay: `step` multiplies the rate by 0.1 at 3/8, 5/8 and 7/8 of the run.
        signed: Give Adam the sign of the gradient only.
        boxed: Clip to valid pixels after each step.
        langevin: Noise after each step, as a multiple of the rate.
        joint_labels: Optimise the labels with the images, from `random` ones or `inferred` ones,
            instead of holding on to the inferred ones.
        line_search: L-BFGS searches along its direction (strong Wolfe) instead of a fixed step.
        spread: Standard deviation of the noise a run starts from, in model-input units.
        dropped: Terms of the paper that are off here, each with the reason; for the report.
    """

    distance: Distance
    weight: Schedule = ((0.0, 1.0),)
    priors: tuple[tuple[str, Prior, Schedule], ...] = ()
    optimizer: Literal["adam", "lbfgs"] = "adam"
    rate: float = 0.1
    decay: Literal["none", "step", "cosine"] = "none"
    signed: bool = False
    boxed: bool = True
    langevin: float = 0.0
    joint_labels: Literal["", "random", "inferred"] = ""
    line_search: bool = False
    spread: float = 1.0
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise expected("a finite rate above 0", self.rate)
        if not 0 <= self.langevin < math.inf:
            raise expected("langevin of at least 0", self.langevin)

    def rate_at(self, share: float) -> float:
        """Return the step size at a share of the run."""
        if self.decay == "step":
            return self.rate * 0.1 ** sum(share >= k / 8 for k in (3, 5, 7))
        if self.decay == "cosine":
            return self.rate * 0.5 * (1 + math.cos(math.pi * share))
        return self.rate

    def phase(self, share: float) -> tuple[float, ...]:
        """Return the weights that hold at a share of the run."""
        return (at(self.weight, share), *(at(schedule, share) for _, _, schedule in self.priors))


Measure = Callable[[Tensor, Tensor], Tensor]
"""Images and labels to the distance of their update, a scalar on their graph."""


@dataclass(eq=False)
class Restart:
    """Free images, label scores where they are optimised, optimizer and best so far."""

    recipe: Recipe
    subspace: Subspace
    free: Tensor
    labels: Tensor | None
    label_scores: Tensor | None
    box: tuple[Tensor, Tensor]
    best: Tensor = field(init=False)
    best_labels: Tensor = field(init=False)
    best_value: float = math.inf
    best_distance: float = math.inf
    first_distance: float | None = None
    phase: tuple[float, ...] = ()
    terms: dict[str, float] = field(default_factory=dict)
    alive: bool = True

    def __post_init__(self) -> None:
        self.free = self.free.detach().clone().requires_grad_()
        if self.label_scores is not None:
            self.label_scores = self.label_scores.detach().clone().requires_grad_()
        self.best = self.free.detach().clone()
        self.best_labels = self.current_labels().detach().clone()
        rate, free = self.recipe.rate, self.variables
        self.optimizer: torch.optim.Optimizer
        if self.recipe.optimizer == "adam":
            self.optimizer = torch.optim.Adam(free, lr=rate)
        else:
            search = "strong_wolfe" if self.recipe.line_search else None
            self.optimizer = torch.optim.LBFGS(free, lr=rate, line_search_fn=search)

    def shorten(self, evaluations: int) -> None:
        """Let one L-BFGS step take at most so many inner iterations and evaluations."""
        for group in self.optimizer.param_groups:
            group["max_iter"] = evaluations
            group["max_eval"] = evaluations * 5 // 4

    @property
    def variables(self) -> list[Tensor]:
        """What the optimizer moves."""
        return [self.free] if self.label_scores is None else [self.free, self.label_scores]

    def images(self) -> Tensor:
        """Return the current model-input images, without a graph."""
        return self.subspace.decode(self.free.detach())

    def current_labels(self) -> Tensor:
        """Return class indices, or probabilities where labels are optimised too."""
        if self.label_scores is not None:
            return self.label_scores.softmax(-1)
        assert self.labels is not None
        return self.labels

    def labels_found(self) -> Tensor:
        """Return what goes with the best images: as `current_labels`."""
        return self.current_labels() if self.label_scores is None else self.best_labels

    def step(
        self,
        share: float,
        measure: Measure,
        prior: Callable[[Prior, Tensor], Tensor],
        generator: torch.Generator,
    ) -> None:
        """Move once; a value that is not finite ends this start and keeps its best."""
        phase = self.recipe.phase(share)
        if phase != self.phase:  # objectives of two phases cannot be compared
            self.phase, self.best_value = phase, math.inf
        rate = self.recipe.rate_at(share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        before = self.free.detach().clone()
        self.optimizer.step(lambda: self._evaluate(measure, prior))  # type: ignore[arg-type]
        with torch.no_grad():
            if self.recipe.langevin:
                noise = torch.randn(self.free.shape, generator=generator).to(self.free)
                self.free.add_(noise, alpha=self.recipe.langevin * rate)
            if self.recipe.boxed:
                images = self.subspace.decode(self.free) if self.subspace.spectrum else self.free
                self.free.copy_(self.subspace.encode(images.clamp(*self.box)))
            if not (self.alive and self.free.isfinite().all()):
                self.alive = False
                self.free.copy_(before)

    def _evaluate(self, measure: Measure, prior: Callable[[Prior, Tensor], Tensor]) -> float:
        weight, *weights = self.phase
        images = self.subspace.decode(self.free)
        terms = {"distance": measure(images, self.current_labels())}
        total = weight * terms["distance"] if weight != 1 else terms["distance"]
        for (name, term, _), factor in zip(self.recipe.priors, weights, strict=True):
            if factor:
                terms[name] = factor * prior(term, images)
                total = total + terms[name]
        gradients = torch.autograd.grad(total, self.variables)
        self.terms = {k: float(v.detach()) for k, v in terms.items()}
        value = float(total.detach())
        if not math.isfinite(value):
            self.alive = False
        elif value < self.best_value:
            self.best_value, self.best = value, self.free.detach().clone()
            self.best_labels = self.current_labels().detach().clone()
            self.best_distance = self.terms["distance"]
        if self.first_distance is None:
            self.first_distance = self.terms["distance"]
        for variable, gradient in zip(self.variables, gradients, strict=True):
            # L-BFGS flattens it as it lies
            variable.grad = gradient.sign() if self.recipe.signed else gradient.contiguous()
        return value

    def state(self) -> dict[str, Any]:
        """Return everything that `load` needs to go on as if nothing had happened."""
        return {
            "free": self.free.detach(),
            "label_scores": None if self.label_scores is None else self.label_scores.detach(),
            "best": self.best,
            "best_labels": self.best_labels,
            "best_value": self.best_value,
            "distances": [self.first_distance, self.best_distance],
            "phase": list(self.phase),
            "alive": self.alive,
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take a saved state."""
        with torch.no_grad():
            self.free.copy_(state["free"])
            if self.label_scores is not None:
                self.label_scores.copy_(state["label_scores"])
        self.best = state["best"].to(self.free)
        self.best_labels = state["best_labels"].to(self.free.device)
        self.best_value, self.alive = state["best_value"], state["alive"]
        self.first_distance, self.best_distance = state["distances"]
        self.phase = tuple(state["phase"])
        self.optimizer.load_state_dict(state["optimizer"])
