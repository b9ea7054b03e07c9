"""The risk corridor of a stack: the bound of its differential privacy, and what canaries prove."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from vitguard.audit.attempts import seed_of
from vitguard.defenses.base import Defense, Ledgered, UpdateDefense
from vitguard.defenses.privacy.canaries import NoiseProof, canary_scores, prove_noise
from vitguard.defenses.privacy.trade_off import power_of
from vitguard.draws import Draws
from vitguard.errors import VitguardError
from vitguard.report.corridor import Corridor

__all__ = ["corridor_of"]

PRIOR = 0.01
CONFIDENCE = 0.999
"""Of the proof: how seldom a sound mechanism is called broken."""


def corridor_of(stack: Sequence[Defense], steps: int | None, seed: int) -> Corridor | None:
    """Return the corridor of one update under a stack; None without differential privacy.

    Of several guarantees it is that of the smallest bound.

    Args:
        steps: Local steps behind the update; None where nobody knows them.
        seed: Makes the coins and the noise of the canaries.
    """
    made = [_of(d, steps, seed) for d in stack if isinstance(d, Ledgered)]
    return min(made, key=lambda c: math.inf if c.bound is None else c.bound, default=None)


def _of(defense: Defense, steps: int | None, seed: int) -> Corridor:
    assert isinstance(defense, Ledgered)
    empty = Corridor(defense.spec(), prior=PRIOR)
    if steps is None and not isinstance(defense, UpdateDefense):
        why = "because how many local steps this update holds is not known"
        return replace(empty, bound_note=why, proof_note=why)
    stated = defense.one_update(steps or 1)
    if stated is None:
        why = "because this defense does not state its noise"
        return replace(empty, bound_note=why, proof_note=why)
    ledger, delta = stated
    if any(noise == 0 for noise, _, _ in ledger.history):
        why = "because it adds no noise: epsilon is infinite"
        return replace(empty, delta=delta, bound_note=why, proof_note=why)
    bounded = replace(
        empty,
        delta=delta,
        bound=power_of(ledger.history)(PRIOR),
        epsilon=ledger.spent(delta).epsilon,
    )
    try:
        proof = _proof(defense, seed)
    except VitguardError as error:
        return replace(bounded, proof_note=f"because no canaries were run: {error}")
    return replace(
        bounded,
        proved=proof.epsilon(delta, ledger.steps),
        proved_rate=proof.power(PRIOR, ledger.steps),
        observations=proof.observations,
        confidence=proof.confidence,
    )


@functools.lru_cache(maxsize=64)
def _proof(defense: Defense, seed: int) -> NoiseProof:
    generator = torch.Generator().manual_seed(seed_of(seed, 0, "canaries"))
    return prove_noise(*canary_scores(defense, Draws(generator)), confidence=CONFIDENCE)
