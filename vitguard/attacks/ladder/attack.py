"""The ladder: every exact attack, cheapest first, and the guess that explains the update best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from vitguard.attacks.base import Attack
from vitguard.attacks.budget import Budget, CutShort, worked
from vitguard.attacks.cascade.attack import Cascade
from vitguard.attacks.evidence import mismatch
from vitguard.attacks.deep_tokens.attack import DeepTokens
from vitguard.attacks.gelu_span.attack import GeluSpan
from vitguard.attacks.labels import pair_labels
from vitguard.attacks.ladder.polish import polish
from vitguard.attacks.position import PositionInversion
from vitguard.attacks.robust.attacks import RobustPosition, RobustSpan
from vitguard.attacks.span.attack import SpanInversion
from vitguard.core import AffineSpace, Guess, View
from vitguard.errors import Blocked, NotApplicable, expected
from vitguard.vit import Anatomy

__all__ = ["Ladder"]

_FITS = 1e-2  # residual of `span` below which its space holds the truth
_CONTRADICTED = 0.1  # above it the patches may be right, but not all in their own image
_EXACT = 1e-3  # a relative mismatch below which no further rung is needed


@dataclass(frozen=True)
class Ladder(Attack):
    """Climb from `position` to `gelu-span`; hand back the guess that verifies itself best.

    Rungs: `position`, `span`, `cascade` (labels of a batch), `gelu-span`, `deep-tokens` (where the
    first block cannot be read), and for damaged gradients `position-robust` and `span-robust`. A rung that does not apply says why in the details. The
    choice never sees the truth: the adversary recomputes the update from each guess with the known
    settings (`View.simulate`) and compares, and counts the patches that proved themselves. A single
    image that is nearly right is polished last.

    Details: `rung`, `verified` (share of patches), `mismatch` of the chosen guess, `rungs` (what
    each said), `exact` (what is known of exact attacks: `"no exact attack known"` where T >= D and
    B >= 2 means that, and not that there is none), `unfinished` (rungs that the budget cut or did
    not reach; an audit then never says `resisted`).

    Args:
        seconds: Budget of all rungs, in nominal seconds of work (`Budget`): the same work, and the
            same result, on every machine. What was found by then is returned.
        levels: Grey levels above zero of an image file, to which `polish` may round; None never.

    Raises:
        NotApplicable: No rung applied; the message has every rung's reason.

    References:
        docs/methods.md 2.5d.
    """

    name: ClassVar[str] = "ladder"
    family: ClassVar[str] = "ladder"
    covers: ClassVar[tuple[str, ...]] = ("closed-form",)
    seconds: float = 60.0
    levels: int | None = 255

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise expected("seconds above 0", self.seconds)
        if self.levels is not None and not self.levels >= 1:
            raise expected("levels of at least 1, or None", self.levels)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return the best guess of all rungs; a keyboard interrupt keeps what was found."""
        climb = _Climb(view, generator, Budget.of(self.seconds))
        try:
            climb.all()
        except KeyboardInterrupt:
            if not climb.guesses:
                raise
            return _cut(climb.best(), "the rest (interrupted)")
        best = climb.best()
        if self._clear(view):
            try:
                best = polish(view, best, generator, climb.budget, levels=self.levels)
            except (NotApplicable, Blocked):  # a rung may need less
                pass
            except KeyboardInterrupt:
                return _cut(best, "polish (interrupted)")
        return best

    def _clear(self, view: View) -> bool:
        return view.update.batch_size == 1 and view.traits.exact


def _cut(guess: Guess, what: str) -> Guess:
    left = [*guess.details.get("unfinished", ()), what]
    return replace(guess, details={**guess.details, "unfinished": left, "interrupted": True})


class _Climb:
    """The rungs tried so far."""

    def __init__(self, view: View, generator: torch.Generator, budget: Budget) -> None:
        self.view, self.generator, self.budget = view, generator, budget
        self.guesses: dict[str, Guess] = {}
        self.distance: dict[str, float] = {}
        self.said: dict[str, str] = {}
        self.unfinished: list[str] = []
        self.labels: torch.Tensor | None = None

    def all(self) -> None:
        """Run the rungs in order; stop at an exact one."""
        damaged = not self.view.traits.exact
        rungs = (self._closed, self._robust, self._batch) if damaged else (
            self._closed, self._batch, self._deep, self._robust)  # fmt: skip
        for climb in rungs:
            climb()
            if self._exact():
                return

    def _closed(self) -> None:
        self._try(PositionInversion)
        if not self._exact():
            self._try(SpanInversion)

    def _batch(self) -> None:
        if self.view.update.batch_size > 1:
            self._try(lambda: Cascade(seconds=self._left(0.2)))
            cascade = self.guesses.pop(Cascade.name, None)
            self.labels = None if cascade is None else cascade.labels
            for name, guess in list(self.guesses.items()) if self.labels is not None else []:
                self._take(name, guess)
        polished = self.view.update.batch_size == 1 and self.view.traits.shuffle is None
        share = 0.5 if polished else 0.8  # `polish` needs the rest
        self._try(lambda: GeluSpan(seconds=self._left(share)), GeluSpan.least)

    def _deep(self) -> None:
        """Where the first block could not be read; else `gelu-span` has searched what it says."""
        if GeluSpan.name not in self.guesses and self.view.update.batch_size == 1:
            self._try(lambda: DeepTokens(seconds=self._left(0.8)), DeepTokens.least)

    def _robust(self) -> None:
        self._try(lambda: RobustPosition(seconds=self._left(0.4)), RobustPosition.least)
        self._try(lambda: RobustSpan(seconds=self._left(0.6)), RobustSpan.least)

    def _left(self, share: float) -> float:
        return max(share * self.budget.left, 0.5)

    def _try(
        self, rung: Callable[[], Attack], least: Callable[[View], float] = lambda view: 0.0
    ) -> None:
        """Run a rung unless less than its `least` nominal seconds are left, or none."""
        attack = rung()
        if self.budget.over or self.budget.left < least(self.view):
            self.said[attack.name] = "not tried: the budget was spent"
            self.unfinished.append(attack.name)
            return
        before = worked()
        try:
            guess = attack.run(self.view, self.generator)
        except (NotApplicable, Blocked) as why:
            self.said[attack.name] = str(why)
            if isinstance(why, CutShort):
                self.unfinished.append(attack.name)
            return
        distance = self._take(attack.name, guess)
        known = "" if distance is None else f"mismatch {distance:.1e}, "
        share = self._verified(attack.name)
        proved = f"verified {share:.2f}, " if guess.verified is not None else ""
        self.said[attack.name] = f"{known}{proved}{1e-9 * (worked() - before):.1f} s"
        if guess.details.get("unfinished"):
            self.unfinished.append(attack.name)
        if guess.details.get("interrupted"):
            raise KeyboardInterrupt

    def _take(self, name: str, guess: Guess) -> float | None:
        """Keep a guess with the labels that are known by now; return its mismatch."""
        labels = guess.labels if self.labels is None else self.labels
        if labels is not None:
            guess = replace(guess, labels=pair_labels(self.view, guess.images, labels))
        self.guesses[name] = guess
        known = guess.details.get("mismatch") if self.view.update.batch_size == 1 else None
        distance = known if isinstance(known, float) else mismatch(self.view, guess)
        if distance is not None:
            self.distance[name] = distance
        return distance

    def _verified(self, name: str) -> float:
        verified = self.guesses[name].verified
        return 0.0 if verified is None else float(verified.double().mean())

    def _exact(self) -> bool:
        return any(self._proved(name) for name in self.guesses)

    def _proved(self, name: str) -> bool:
        """Whether the update, or every patch without the update saying otherwise, proves it."""
        distance = self.distance.get(name)
        if distance is not None and distance < _EXACT:
            return True
        return self._verified(name) == 1.0 and (distance is None or distance < _CONTRADICTED)

    def best(self) -> Guess:
        """Return the chosen guess with what every rung said."""
        if not self.guesses:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.said.items())
            raise NotApplicable(f"no rung applied ({reasons})")

        def worth(name: str) -> tuple[bool, float, float, int]:
            share, distance = self._verified(name), self.distance.get(name)
            likeness = -1e9 if distance is None else -distance
            whole = len(self.guesses[name].images) == self.view.update.batch_size
            return self._proved(name), share, likeness, int(whole)

        name = max(self.guesses, key=worth)
        guess = self.guesses[name]
        if self.distance.get(name, 1.0) < _EXACT:  # the whole update is explained
            proved = torch.ones(len(guess.images), Anatomy.of(self.view.model).patches)
            told = {**guess.details, "told_apart": len(guess.images)}
            guess = replace(guess, verified=proved.bool(), details=told)
            self.guesses[name] = guess
        details: dict[str, Any] = {
            **guess.details,
            "rung": name,
            "verified": self._verified(name),
            "mismatch": self.distance.get(name),
            "rungs": dict(self.said),
            "exact": _known(self.view),
        }
        details.pop("unfinished", None)
        if self.unfinished and not self._proved(name):
            details["unfinished"] = list(self.unfinished)
        return replace(guess, space=self._space(guess), details=details)

    def _space(self, guess: Guess) -> AffineSpace | None:
        """What the guess, else `span`, leaves open, where that is known exactly."""
        source = guess if guess.space is not None else self.guesses.get(SpanInversion.name)
        if source is None or (source is not guess and self.view.traits.shuffle is not None):
            return None
        return source.space if source.details.get("residual", 1.0) < _FITS else None


def _known(view: View) -> str:
    """What is known of exact attacks on this many tokens of this width."""
    anatomy, batch = Anatomy.of(view.model), view.update.batch_size
    tokens = batch * anatomy.tokens
    if tokens < anatomy.width:
        return "exact attack known"
    return "no exact attack known" if batch > 1 else "exact only with readable positions or patches"
