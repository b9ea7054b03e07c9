"""Budgets of work: what an attack may do, whatever the machine and whatever else runs on it.

A deadline on a clock makes a result depend on the machine: a busy one reaches less, and a defense
seems to hold. Here loops charge what they compute, by size, to a counter of their thread, and a
budget ends where the counter does. The unit is a nominal second: about what one core of a server
of 2023 (AVX-512, some 50 GFLOP/s in float64) does in a second. The same attack with the same seed
therefore ends at the same step everywhere; only how long that takes differs.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

from vitguard.core import View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = [
    "ENDLESS",
    "Budget",
    "CutShort",
    "charge",
    "charge_update",
    "nominal",
    "update_seconds",
    "worked",
]

# What a nominal second holds, of each kind of work in float64.
_PRODUCTS = 4e10  # operations of matrix products, two for a multiplication and addition
_SVD = 2.2e9  # rows * columns * smaller of both, of singular value decompositions and pinv
_QR = 7e9  # the same of QR; an eigendecomposition is two of them
_ELEMENTS = 3e8  # numbers through an activation; a plain sum or product takes a tenth
_CALLS = 2e5  # calls of a tensor function, which small tensors are all about

_UPDATE_PASSES = 12.0  # over every parameter in a simulated update and its comparison

_LOCAL = threading.local()


def worked() -> int:
    """Return the work of this thread so far, in nominal nanoseconds: whole numbers add exactly."""
    return getattr(_LOCAL, "worked", 0)


def nominal(
    *,
    products: float = 0.0,
    svd: float = 0.0,
    qr: float = 0.0,
    elements: float = 0.0,
    calls: float = 0.0,
    share: float = 1.0,
) -> float:
    """Return the nominal seconds of some work; `share` scales all but calls, 0.5 for float32."""
    seconds = products / _PRODUCTS + svd / _SVD + qr / _QR + elements / _ELEMENTS
    return share * seconds + calls / _CALLS


def charge(**work: float) -> None:
    """Count work that is done; see `nominal`."""
    _count(nominal(**work))


def _count(seconds: float) -> None:
    _LOCAL.worked = worked() + round(1e9 * seconds)


def update_seconds(view: View, *, images: int | None = None) -> float:
    """Return the nominal seconds of simulating the update of a view, or one of so many images."""
    anatomy, update = Anatomy.of(view.model), view.update
    images = update.batch_size if images is None else images
    parameters = sum(p.numel() for p in view.model.parameters())
    each = nominal(
        products=0.7 * 6.0 * parameters * anatomy.tokens * images,
        elements=0.1 * _UPDATE_PASSES * parameters,
        calls=60.0 * max(len(anatomy.blocks), 1),
    )
    return max(update.local_steps, 1) * each


def charge_update(view: View, *, times: float = 1.0, images: int | None = None) -> None:
    """Count `times` the work of `update_seconds`."""
    _count(times * update_seconds(view, images=images))


@dataclass(frozen=True)
class Budget:
    """Work up to a point of this thread's counter.

    Args:
        end: Nominal nanoseconds of the counter at which it is spent.
    """

    end: float = math.inf

    @staticmethod
    def of(seconds: float) -> Budget:
        """Return a budget of so many nominal seconds from now."""
        return Budget(worked() + round(1e9 * seconds)) if math.isfinite(seconds) else ENDLESS

    @property
    def over(self) -> bool:
        """Whether it is spent."""
        return worked() >= self.end

    @property
    def left(self) -> float:
        """Nominal seconds that are left, not below 0."""
        return max(self.end - worked(), 0) / 1e9

    def part(self, share: float) -> Budget:
        """Return a share of what is left, from now."""
        return Budget.of(share * self.left)


class CutShort(NotApplicable):
    """The budget ended before the attack could say anything; with more it might have."""


ENDLESS = Budget()
"""No budget: loops end by their own rules."""
