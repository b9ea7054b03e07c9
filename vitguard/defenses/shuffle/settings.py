"""What a patch shuffle is told to do, and the values that are allowed."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from vitguard.defenses.shuffle.localization import Head
from vitguard.errors import expected

__all__ = ["Localization", "ShuffleSettings"]

Mask = Literal["blockwise", "uniform"]
Draw = Literal["image", "batch"]
Schedule = Literal["constant", "linear", "cosine"]
Localization = Literal["none", "positions", "tokens"]


@dataclass(frozen=True)
class ShuffleSettings:
    """The settings of `PatchShuffle`, which says what each means.

    Raises:
        InputError: A setting out of range.
    """

    ratio: float = 0.7
    mask: Mask = "blockwise"
    draw: Draw = "image"
    derangement: bool = False
    probability: float = 1.0
    warmup: int = 0
    schedule: Schedule = "constant"
    steps: int = 0
    dal: Localization = "none"
    dal_head: Head = "linear"
    dal_weight: float = 0.01
    dal_final: float = 0.005

    def __post_init__(self) -> None:
        for name, kind in (
            ("mask", Mask), ("draw", Draw), ("schedule", Schedule), ("dal", Localization),
            ("dal_head", Head),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(kind):
                raise expected(
                    f"{name} among {', '.join(get_args(kind))}", repr(getattr(self, name))
                )
        for name in ("ratio", "probability"):
            if not 0 <= _number(name, getattr(self, name)) <= 1:
                raise expected(f"{name} in [0, 1]", getattr(self, name))
        for name in ("dal_weight", "dal_final"):
            if not 0 <= _number(name, getattr(self, name)) < float("inf"):
                raise expected(f"a finite {name} of at least 0", getattr(self, name))
        for name in ("warmup", "steps"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, Integral) or count < 0:
                raise expected(f"{name} as a whole number of at least 0", repr(count)[:80])
        if not isinstance(self.derangement, bool):
            raise expected("derangement to be true or false", repr(self.derangement)[:80])
        if self.steps <= self.warmup and (self.steps or self.schedule != "constant"):
            raise expected(f"steps beyond the warm-up of {self.warmup}", self.steps)


def _number(name: str, value: object) -> float:
    """Return a setting that is one number; 0 and 1 are, true and false are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise expected(f"{name} as a number", repr(value)[:80])
    return float(value)
