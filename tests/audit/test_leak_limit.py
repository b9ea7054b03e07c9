"""The limit above which a guess is a leak is the one that is said: 6 dB, of one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from vitguard.attacks.base import Attack
from vitguard.audit import audit
from vitguard.core import Guess
from vitguard.report.finding import LEAK_GAIN


@dataclass(frozen=True)
class Near(Attack):
    """Returns the truth with an error of a given size; nothing of the update is used."""

    name: ClassVar[str] = "near"
    family: ClassVar[str] = "matching"
    deviation: float = 1.0
    truth: tuple = ()

    def run(self, view, generator):
        (truth,) = self.truth
        noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
        return Guess((truth + self.deviation * noise).clamp(0, 1))


@pytest.mark.parametrize(("above", "verdict"), [(2.0, "leaks"), (-2.0, "inconclusive")])
def test_a_guess_leaks_from_six_db_above_one_without_information(small_vit, photo, above, verdict):
    middle = 0.2 + 0.6 * photo  # room on both sides, so that little is cut off
    model, batch = small_vit(depth=1), (middle, torch.tensor([1]))
    level = audit(model, batch, attacks=[Near(truth=(middle,))]).baseline.patch_psnr
    deviation = 10 ** (-(level + LEAK_GAIN + above) / 20)
    (finding,) = audit(model, batch, attacks=[Near(deviation, (middle,))]).findings
    assert abs(finding.gain - LEAK_GAIN - above) < 1.5
    assert finding.verdict == verdict, (finding.gain, finding.reason)
