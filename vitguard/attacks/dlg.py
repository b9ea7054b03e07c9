"""DLG and iDLG: plain squared distance, L-BFGS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vitguard.attacks._distances import SquaredError
from vitguard.attacks._matching import MatchingAttack
from vitguard.attacks._restart import Recipe
from vitguard.core import View
from vitguard.vit import Anatomy

__all__ = ["DLG", "IDLG"]


@dataclass(frozen=True)
class DLG(MatchingAttack):
    """Squared distance of all tensors; images and labels are optimised together.

    Args:
        rate: Step of L-BFGS.
        line_search: Strong Wolfe search instead of the paper's fixed step, which diverges often.

    References:
        Zhu et al., arXiv 1906.08935, algorithm 1; 300 iterations of up to 20 evaluations.
    """

    name: ClassVar[str] = "dlg"

    iterations: int = 300
    rate: float = 1.0
    line_search: bool = False

    @classmethod
    def fast(cls, **changes: Any) -> DLG:
        """Return a preset for a CPU: 20 iterations or what its budget lasts for."""
        return cls._preset({"iterations": 20, "line_search": True, "spectrum": 1.0}, changes)

    def recipe(self, view: View, anatomy: Anatomy) -> Recipe:
        """See `MatchingAttack`."""
        return _recipe(self.rate, self.line_search, joint_labels=True)


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
        return cls._preset({"iterations": 20, "line_search": True, "spectrum": 1.0}, changes)

    def recipe(self, view: View, anatomy: Anatomy) -> Recipe:
        """See `MatchingAttack`."""
        return _recipe(self.rate, self.line_search, joint_labels=False)


def _recipe(rate: float, line_search: bool, *, joint_labels: bool) -> Recipe:
    return Recipe(
        distance=SquaredError(),
        optimizer="lbfgs",
        rate=rate,
        boxed=False,
        joint_labels=joint_labels,
        line_search=line_search,
    )
