"""An exposure: one thing that left a machine, with what the audit knows about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from vitguard.audit.scale import Scale
from vitguard.core import View
from vitguard.defenses.base import Defense, UpdateDefense
from vitguard.report.corridor import Corridor

__all__ = ["Exposure", "Facts", "Run", "bound_of"]


@dataclass(frozen=True)
class Facts:
    """What the audit knows of a batch and its adversary does not.

    Args:
        names: Names of the images.
        patch_size: (height, width) of a patch in pixels.
        truths: The images, pixels in [0, 1]; None where nobody knows them.
        labels: Their classes; None where they are not known.
        scale: What scores are compared with; None without `truths`.
        certain: Whether the audit itself made the update from these images. Where the caller only
            states them, a guess that reproduces the update is a leak, whichever images were stated.
    """

    names: tuple[str, ...]
    patch_size: tuple[int, int]
    truths: Tensor | None = None
    labels: Tensor | None = None
    scale: Scale | None = None
    certain: bool = True


@dataclass(frozen=True)
class Exposure:
    """One thing that left a machine: what the adversary sees of it.

    Args:
        view: What the threat grants.
        mask: Positions that were shuffled, shape (batch, patches); None without a shuffle.
    """

    view: View
    mask: Tensor | None = None


class Run(NamedTuple):
    """One configuration: a name and, for each of its batches, the facts and how it is exposed.

    `bound` maps the chance of a blind guess to the largest chance of any attack that the stack
    guarantees; None where it guarantees none. `exposure` names what left the machine where an audit
    looks at several things: each of them has a control of its own. `corridor` is what differential
    privacy says of one update.
    """

    name: str
    batches: tuple[tuple[Facts, Callable[[], Exposure]], ...]
    bound: Callable[[float], float | None] = lambda prior: None
    exposure: str = ""
    corridor: Corridor | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the other runs of an audit."""
        return self.exposure, self.name


def bound_of(stack: Sequence[Defense], steps: int | None) -> Callable[[float], float | None]:
    """Return the guarantee of a stack for one update of so many local steps, as in `Run`.

    Where nobody knows the steps, it is that of the defenses that act on the update as a whole.
    """
    holding = [d for d in stack if steps is not None or isinstance(d, UpdateDefense)]

    def bound(prior: float) -> float | None:
        held = [d.reconstruction_bound(prior, steps or 1) for d in holding]
        return min((b for b in held if b is not None), default=None)

    return bound
