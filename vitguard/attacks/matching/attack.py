"""What all gradient-matching attacks share: settings, and the one loop they run.

Dummy images give a dummy update under the settings the adversary knows; distance and priors give a
step. A paper is a `Recipe`: which distance, which priors, which optimizer, which schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitguard.attacks.matching.run import Run
from vitguard.attacks.matching.settings import MatchingSettings
from vitguard.core import Guess, View

__all__ = ["MatchingAttack"]


@dataclass(frozen=True)
class MatchingAttack(MatchingSettings):
    """Base of the gradient-matching attacks: `MatchingSettings`, and the loop they are for."""

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Match the update; Ctrl-C ends the run and returns the best so far.

        Raises:
            Blocked: None of the tensors to match can be read.
            NotApplicable: The update cannot be simulated.
        """
        return Run(self, view, generator).go()

    def begins_at(self, view: View, generator: torch.Generator) -> Tensor:
        """Return the pixels that `run` would start from: the least an attack must improve on."""
        run = Run(self, view, generator)
        return run._pixels(run.restarts[0].images())
