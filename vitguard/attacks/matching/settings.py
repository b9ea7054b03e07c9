"""The settings of all gradient-matching attacks, and what a paper says of itself: its recipe."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

from vitguard.attacks.base import Attack
from vitguard.attacks.matching.progress import Progress
from vitguard.attacks.matching.restart import Recipe
from vitguard.core import Guess, View
from vitguard.errors import expected
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy

__all__ = ["CPU_BUDGET", "MatchingSettings"]

CPU_BUDGET = 1e12
"""Operations for each image in a `fast` preset: about 15 s on one core."""


@dataclass(frozen=True)
class MatchingSettings(Attack):
    """What the loop of a matching attack is run with.

    Args:
        iterations: Optimizer steps.
        parameters: Which tensors are matched: `attention`, `mlp`, `patch`, `position`, `all` or a
            regular expression over parameter names.
        restarts: Starts that run side by side; the one with the smallest distance is returned.
        subspace: Search only where an exact attack left room: patches that the start proved stay,
            the others lie in its affine space, else in the row space of the patch gradient where
            that is smaller than the pixels. Of a batch only patches whose image is known stay, of a
            shuffle none.
        spectrum: Search in coordinates whitened by frequency^spectrum; 1 is the spectrum of photos,
            0 the papers' free pixels. It is for L-BFGS and plain Adam; signs undo it.
        budget: Floating-point operations that a run may cost for each image of the batch, at about
            6 for a weight and token there and back; fewer iterations run where it does not last.
            Unlike `seconds` it gives the same result on every machine.
        derivative: `exact` (double backward), `difference` (two passes at neighbouring
            weights), or `auto`: the difference for Adam where the update is a plain gradient.
        seconds: Budget of this thread's processor time; the best so far is returned when it is
            spent. With one, the result depends on the machine's speed.
        resume: File to keep the run in: a killed run continues from it to the same end.
        start: Guess of another attack to start from, for example the ladder's.
        watch: Called after every iteration with a `Progress`: a progress bar, TensorBoard.
    """

    family: ClassVar[str] = "matching"

    iterations: int = 1000
    parameters: str = "all"
    restarts: int = 1
    subspace: bool = True
    spectrum: float = 0.0
    budget: float | None = None
    derivative: Literal["auto", "exact", "difference"] = "auto"
    seconds: float | None = None
    resume: str | None = None
    start: Guess | None = field(default=None, repr=False, compare=False, kw_only=True)
    watch: Callable[[Progress], None] | None = field(
        default=None, repr=False, compare=False, kw_only=True
    )

    def remains(self, plain: Released) -> tuple[Remaining, ...]:
        """Say what share there is to fit dummy images to; one statement for all matching."""
        count = sum(plain.sizes[n] for n in plain.plain)
        if not count:
            return (Remaining(self.family, False, (), "nothing is plain"),)
        share = count / sum(plain.sizes.values())
        why = (
            f"{share:.0%} of the gradient is plain and dummy images can be fitted to it; no count "
            "says how far that gets: try it with audit"
        )
        readable = tuple(n for n in plain.sizes if n in plain.plain)
        return (Remaining(self.family, True, readable, why),)

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.restarts < 1:
            raise expected(
                "iterations and restarts of at least 1",
                f"iterations={self.iterations}, restarts={self.restarts}",
            )
        if not 0 <= self.spectrum <= 3:
            raise expected("spectrum in [0, 3]", self.spectrum)
        if self.derivative not in ("auto", "exact", "difference"):
            raise expected("derivative auto, exact or difference", repr(self.derivative))
        if self.seconds is not None and not self.seconds > 0:
            raise expected("seconds above 0 or None", self.seconds)
        if self.budget is not None and not self.budget > 0:
            raise expected("budget above 0 or None", self.budget)
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise expected(f"a finite {name}", value)

    @classmethod
    def _preset(cls, preset: Mapping[str, Any], changes: Mapping[str, Any]) -> Self:
        """Build with a preset's values and a CPU's budget, which given iterations lift."""
        budget = None if "iterations" in changes else CPU_BUDGET
        return cls(**{"budget": budget, **preset, **changes})

    @abstractmethod
    def recipe(self, view: View, anatomy: Anatomy) -> Recipe:
        """Return the paper's terms for what `view` grants."""

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values: numbers and words, no guess or callback."""
        plain = (bool, int, float, str, type(None), tuple)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if isinstance(v, plain) and k not in _TOOLS}


_TOOLS = ("start", "watch")
