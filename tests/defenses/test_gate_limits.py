"""Each limit of a gate refuses on its own, and what an attack left unfinished is no pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from vitguard.attacks.base import Attack
from vitguard.core import Guess, Update
from vitguard.defenses.gate import LeakGate, Tally, Tried
from vitguard.errors import GateClosed
from vitguard.guard import protect

UPDATE = Update({"w": torch.ones(2)})
LIMITS = {
    "gain": (LeakGate(max_gain=6), {"gain": 6.1}, {"gain": 5.9}),
    "gain beside a limit in dB": (LeakGate(max_psnr=30), {"gain": 6.1}, {"psnr": 29.0}),
    "dB alone": (LeakGate(max_gain=None, max_psnr=20), {"psnr": 20.1}, {"psnr": 19.9}),
    "a patch that was proved": (LeakGate(), {"proved": 0.1, "gain": -5.0}, {"gain": -5.0}),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_each_limit_alone_refuses_what_is_above_it_and_passes_what_is_below(limit):
    gate, above, below = LIMITS[limit]
    tally = Tally()
    assert gate.passage(UPDATE, lambda u: [Tried("one", "ran", **below)], tally) is UPDATE
    with pytest.raises(GateClosed, match="one rebuilds an image"):
        gate.passage(UPDATE, lambda u: [Tried("one", "ran", **above)], tally)
    assert tally.counts == {"passed": 1, "refused": 1}


@dataclass(frozen=True)
class Cut(Attack):
    """Returns grey, and says that it did not come to its end."""

    name: ClassVar[str] = "cut"
    family: ClassVar[str] = "closed-form"

    def run(self, view, generator):
        grey = torch.full((1, *view.image_shape), 0.5)
        return Guess(grey, details={"unfinished": ["the last rung"]})


def test_a_gate_never_passes_what_an_attack_left_unfinished(small_vit, photo, monkeypatch):
    monkeypatch.setattr("vitguard.self_attack.attack_types", lambda: {"cut": Cut})
    guard = protect(small_vit(depth=1).train(), "gate")
    with pytest.raises(GateClosed, match=r"not decided.*the last rung"):
        guard.update(photo * 2 - 1, torch.tensor([1]))
