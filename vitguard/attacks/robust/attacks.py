"""Robust forms of `position` and `span`: an image prior, its weight chosen without the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.budget import ENDLESS, Budget, nominal, update_seconds
from vitguard.attacks.equations.rows import guess_from_patches
from vitguard.attacks.evidence import check_seconds, mismatch, require_finite, surprise
from vitguard.attacks.labels import try_labels
from vitguard.attacks.position import PositionInversion
from vitguard.attacks.robust.position_estimates import position_estimates
from vitguard.attacks.robust.span_estimates import Containment
from vitguard.attacks.span.attack import SpanInversion
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable
from vitguard.vit import Anatomy

__all__ = ["Choice", "RobustPosition", "RobustSpan", "position_candidates", "span_candidates"]

Settings = dict[str, Any]
Candidate = tuple[Settings, Tensor]

_HOLDS = (10.0, 1.0, 100.0)
"""Times the noise estimate: neither the prior nor the noise is more than roughly Gaussian."""
_SOFTNESS = (1e-5, 1e-4, 1e-6, 1e-3, 1e-2)
"""Where noise cannot be told from signal: full spans, or several local steps."""
ROUNDS = 2


@dataclass(frozen=True)
class RobustPosition(Attack):
    """`position` under a natural-image prior, for noisy, rounded, clipped or pruned gradients.

    The noise level is read off the equations that no image can fill. Of the candidates (the plain
    solution among them) the one is returned under which the update is most probable: the adversary
    simulates the update of each and compares (`surprise`). Where nothing can be simulated the
    first candidate, which goes by the noise estimate alone, is taken.

    Args:
        seconds: Budget of the candidates, in nominal seconds of work (`Budget`).

    Raises:
        NotApplicable: No plain embedding or no positions.
        Blocked: The position or patch gradient is not in the update.

    References:
        docs/methods.md 2.5c, 4.5.
    """

    name: ClassVar[str] = "position-robust"
    family: ClassVar[str] = "ladder"
    rung: ClassVar[Rung | None] = Rung(50, 30, instead_of=("position",))
    seconds: float = 20.0

    def __post_init__(self) -> None:
        check_seconds(self.seconds)

    def require(self, view: View) -> None:
        """Check for a plain embedding and the gradients of positions and patches."""
        anatomy = Anatomy.of(view.model)
        anatomy.require_plain_embedding()
        if anatomy.positions is None:
            raise NotApplicable("the model has no absolute position embedding")
        for name in (anatomy.positions, anatomy.patch_weight):
            view.update.read(name)

    def share(self, view: View) -> float:
        """Return the share of the ladder's work left."""
        return 0.4

    def least(self, view: View) -> float:
        """Return about how many nominal seconds a first candidate and the plain one take."""
        return 2 * update_seconds(view)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return the image under which the update is most probable."""
        choice = Choice(view, generator, self.seconds)
        choice.offer(position_candidates(view, choice.anatomy, generator, choice.budget))
        return choice.guess()


@dataclass(frozen=True)
class RobustSpan(Attack):
    """`span` under a natural-image prior, for gradients that are not exact.

    First the seen row space with soft directions, then maximum likelihood of the containment of the
    first block's tokens in the gradient's row space. Noise level and choice as in `RobustPosition`.

    Args:
        seconds: Budget of the candidates, in nominal seconds of work (`Budget`).

    Raises:
        NotApplicable: No plain embedding, no positions, or no pre-norm first block.
        Blocked: The gradient of query, key and value is not in the update.

    References:
        docs/methods.md 2.5c, 4.5.
    """

    name: ClassVar[str] = "span-robust"
    family: ClassVar[str] = "ladder"
    rung: ClassVar[Rung | None] = Rung(60, 40, instead_of=("span",))
    seconds: float = 30.0

    def __post_init__(self) -> None:
        check_seconds(self.seconds)

    def require(self, view: View) -> None:
        """Check for a plain embedding, a pre-norm first block, and a gradient of its rows."""
        anatomy = Anatomy.of(view.model)
        anatomy.require_plain_embedding()
        blocks = anatomy.blocks
        if anatomy.positions is None or not blocks or not blocks[0].pre_norm:
            raise NotApplicable("needs absolute positions and a first norm before the attention")
        names = anatomy.blocks[0].qkv
        if names and not any(view.update.can_read(name) for name in names):
            view.update.read(names[0])

    def share(self, view: View) -> float:
        """Return the share of the ladder's work left."""
        return 0.6

    def least(self, view: View) -> float:
        """Return about how many nominal seconds a first candidate and the plain one take."""
        width, pixels = Anatomy.of(view.model).width, Anatomy.of(view.model).patch_pixels
        return nominal(svd=2.0 * width**3 + 2.0 * pixels**3) + 2 * update_seconds(view)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return the image under which the update is most probable."""
        choice = Choice(view, generator, self.seconds)
        starts, refined = span_candidates(view, choice.anatomy, generator, choice.budget)
        choice.offer(starts)
        for _ in range(ROUNDS):
            if not choice.offer(refined(choice.patches)):
                break
        return choice.guess()


def position_candidates(
    view: View, anatomy: Anatomy, generator: torch.Generator, budget: Budget = ENDLESS
) -> Iterator[Candidate]:
    """Yield the (settings, patches) that `position-robust` chooses from.

    Args:
        budget: Once it is spent estimates are rough.

    Raises:
        NotApplicable: See `RobustPosition`.
        Blocked: See `RobustPosition`.
    """
    RobustPosition().require(view)
    summed = view.gradient(steps=True)
    require_finite(summed)
    return _with_plain(
        position_estimates(summed, anatomy, budget), PositionInversion(), view, anatomy, generator
    )


def span_candidates(
    view: View, anatomy: Anatomy, generator: torch.Generator, budget: Budget = ENDLESS
) -> tuple[Iterator[Candidate], Callable[[Tensor], Iterator[Candidate]]]:
    """Return the first candidates of `span-robust`, and what refines the best of them.

    Args:
        budget: Once it is spent estimates are rough.

    Raises:
        NotApplicable: See `RobustSpan`.
        Blocked: See `RobustSpan`.
    """
    RobustSpan().require(view)
    summed = view.gradient(steps=True)
    require_finite(summed)
    forms = {even: Containment(summed, anatomy, even=even, budget=budget) for even in (True, False)}
    tokens = view.update.batch_size * anatomy.patches + anatomy.prefix_tokens
    clear = tokens < anatomy.width and view.update.local_steps == 1

    def starts() -> Iterator[Candidate]:
        levels = [(0.0, hold) for hold in _HOLDS] if tokens < anatomy.width else []
        for softness, hold in levels + ([] if clear else [(s, 1.0) for s in _SOFTNESS]):
            for even, form in forms.items():
                settings = {"rows": "even" if even else "unit", "softness": softness, "hold": hold}
                for patches in form.starts(softness, hold):
                    yield {**settings, "step": "singular vectors"}, patches

    def refined(best: Tensor) -> Iterator[Candidate]:
        for hold in _HOLDS:
            for even, form in forms.items():
                settings = {"rows": "even" if even else "unit", "hold": hold}
                for patches in form.refine(best, hold):
                    yield {**settings, "step": "containment"}, patches

    return _with_plain(starts(), SpanInversion(), view, anatomy, generator), refined


def _with_plain(
    candidates: Iterator[Candidate],
    plain: Attack,
    view: View,
    anatomy: Anatomy,
    generator: torch.Generator,
) -> Iterator[Candidate]:
    """Yield the first candidate, then the plain attack's solution, then the others."""
    yield next(candidates)
    try:
        images = plain.run(view, generator).images.to(torch.float64)
        yield {"plain": plain.name}, anatomy.patchify(view.normalization.apply(images))[0]
    except (Blocked, NotApplicable):
        pass
    yield from candidates


class Choice:
    """The best candidate so far, as the simulated update says."""

    def __init__(self, view: View, generator: torch.Generator, seconds: float) -> None:
        self.view, self.anatomy = view, Anatomy.of(view.model)
        self.labels = try_labels(view, generator)
        if self.labels is None and view.update.batch_size == 1:
            # one label, and every step's gradient has its sign: the sum over local steps will do
            self.labels = try_labels(view.gradient(steps=True), generator)
        self.budget = Budget.of(seconds)
        self.cut = False
        self.best: Guess | None = None
        self.patches = torch.empty(0)
        self.least: float | None = float("inf")

    def offer(self, candidates: Iterable[Candidate]) -> bool:
        """Try candidates within the budget; return whether one became the best."""
        better = False
        for settings, patches in candidates:
            if not bool(patches.isfinite().all()):
                continue
            guess = guess_from_patches(
                self.view, self.anatomy, patches, labels=self.labels, details=settings
            )
            score = surprise(self.view, guess)
            self.cut = self.budget.over  # then the solver may have stopped in this very candidate
            if score is None:  # nothing tells them apart: the first goes by the noise estimate
                if self.best is None:
                    self.best, self.patches, self.least = guess, patches, None
                return False
            if self.least is not None and score < self.least:
                self.best, self.patches, self.least, better = guess, patches, score, True
            if self.cut:
                return False
        return better

    def guess(self) -> Guess:
        """Return the best with what it was chosen by.

        Raises:
            NotApplicable: No candidate was finite.
        """
        if self.best is None:
            raise NotApplicable("the update is not finite, and so is its solution")
        chosen = "by the noise estimate" if self.least is None else "by the simulated update"
        distance = mismatch(self.view, self.best)
        details = {**self.best.details, "mismatch": distance, "chosen": chosen}
        if self.cut:
            details["unfinished"] = ["all candidates were tried (budget)"]
        return guess_from_patches(
            self.view,
            self.anatomy,
            self.patches,
            labels=self.labels,
            details=details,
        )
