"""Which attacks apply to the updates of one model: what they say of it, for any batch and stack."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from vitguard.advise.report import Applies
from vitguard.analysis import released, remaining
from vitguard.core import Traits
from vitguard.defenses.base import traits_of
from vitguard.released import Remaining
from vitguard.trained import train_only, trained_sizes
from vitguard.vit import Anatomy

__all__ = ["Counts"]

_MOST = 1 << 16  # images of a batch that are looked at


@dataclass(frozen=True)
class Counts:
    """The attacks' own statements about updates of one model, for any batch and stack."""

    model: nn.Module
    anatomy: Anatomy
    train: str

    @cached_property
    def sent(self) -> dict[str, int]:
        return trained_sizes(self.model, self.anatomy, self.train)

    def at(self, batch_size: int, traits: Traits | None = None) -> dict[str, Remaining]:
        traits = traits_of([], self.anatomy) if traits is None else traits
        plain = released(self.model, self.anatomy, traits, trained=self.sent, batch_size=batch_size)
        return {one.attack: one for one in remaining(plain)}

    @cached_property
    def trained(self) -> nn.Module:
        """The model as it is trained, which is what a stack must fit."""
        if self.train == "all":
            return self.model
        return train_only(copy.deepcopy(self.model), self.train, anatomy=self.anatomy)

    @cached_property
    def series(self) -> dict[int, dict[str, Remaining]]:
        return {}

    def _seen(self, batch_size: int) -> dict[str, Remaining]:
        if batch_size not in self.series:
            self.series[batch_size] = self.at(batch_size)
        return self.series[batch_size]

    def attacks(self, batch_size: int) -> Iterator[Applies]:
        for name, one in self._seen(batch_size).items():
            applies = one.possible
            yield Applies(
                name,
                applies,
                applies and one.exact,
                one.reason,
                self._last(name, exact=True),
                None if (last := self._last(name, exact=False)) >= _MOST else last + 1,
            )

    def _last(self, name: str, *, exact: bool) -> int:
        """Return the largest batch at which an attack applies, or is exact; 0 for none."""

        def holds(size: int) -> bool:
            one = self._seen(size).get(name)
            return one is not None and one.possible and (one.exact or not exact)

        if not holds(1):
            return 0
        low = 1
        while low < _MOST and holds(2 * low):
            low *= 2
        if low >= _MOST:
            return low
        high = 2 * low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low
