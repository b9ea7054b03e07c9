"""DLG and iDLG: plain squared distance, L-BFGS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vitguard.attacks.matching.attack import MatchingAttack
from vitguard.attacks.matching.distances import SquaredError
from vitguard.attacks.matching.restart import Recipe
from vitguard.core import View
from vitguard.errors import expected
from vitguard.vit import Anatomy

__all__ = ["DLG", "IDLG"]

_FAST = {"iterations": 20, "line_search": True, "spectrum": 1.0}


@dataclass(frozen=True)
class DLG(MatchingAttack):
    """Squared distance of all tensors; images and labels are optimised together.

    Args:
        labels: What the labels are optimised from: `random` ones (the paper's) or `inferred` ones.
        rate: Step of L-BFGS.
        line_search: Strong Wolfe search instead of the paper's fixed step, which diverges often.

    References:
        Zhu et al., arXiv 1906.08935, algorithm 1; 300 iterations of up to 20 evaluations.
    """

    name: ClassVar[str] = "dlg"

    iterations: int = 300
    labels: Literal["random", "inferred"] = "random"
    rate: float = 1.0
    line_search: bool = False

    @classmethod
    def fast(cls, **changes: Any) -> DLG:
        """Return a preset for a CPU: 20 iterations or what its budget lasts for."""
        return cls._preset({**_FAST, "labels": "inferred"}, changes)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels not in ("random", "inferred"):
            raise expected("labels random or inferred", repr(self.labels))

    def recipe(self, view: View, anatomy: Anatomy) -> Recipe:
        """See `MatchingAttack`."""
        return _recipe(self.rate, self.line_search, self.labels)


@dataclass(frozen=True)
class IDLG(MatchingAttack):
    """DLG with the label read off the head's gradient instead of optimised.

    Args:
        rate: Step of L-BFGS.
        line_search: Strong Wolfe search instead of the paper's fixed step, which diverges often.

    References:
        Zhao et al., arXiv 2001.02610; the label rule is the sign rule of docs/methods.md 2.5.
    """

    name: ClassVar[str] = "idlg"

    iterations: int = 300
    rate: float = 1.0
    line_search: bool = False

    @classmethod
    def fast(cls, **changes: Any) -> IDLG:
        """Return a preset for a CPU: 20 iterations or what its budget lasts for."""
        return cls._preset(_FAST, changes)

    def recipe(self, view: View, anatomy: Anatomy) -> Recipe:
        """See `MatchingAttack`."""
        return _recipe(self.rate, self.line_search, "")


def _recipe(
    rate: float, line_search: bool, joint_labels: Literal["", "random", "inferred"]
) -> Recipe:
    return Recipe(
        distance=SquaredError(),
        optimizer="lbfgs",
        rate=rate,
        boxed=False,
        joint_labels=joint_labels,
        line_search=line_search,
    )
