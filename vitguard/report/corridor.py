"""The risk corridor of a private stack: what its bound allows, and what canaries prove of it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Corridor"]


@dataclass(frozen=True)
class Corridor:
    """What differential privacy says of one update; what attacks reached lies in between.

    Args:
        defense: The spec of the defense whose bound it is, the strongest of a stack.
        prior: Chance that a guess succeeds without the update, in (0, 1); also the false positive
            rate of the membership test.
        bound: Largest chance of any attack that would succeed with `prior` without the update, and
            largest true positive rate of any membership test; None where there is none.
        epsilon: What this update spends, at `delta`; None without a bound, or where it is infinite.
        bound_note: Why there is no bound, or what limits it.
        proved: Epsilon of this update that canaries prove at least; None where none were run.
        proved_rate: True positive rate that a membership test of the canaries reaches at least.
        observations: Canaries times releases behind the proof.
        confidence: Chance that the proof holds.
        proof_note: Why there is no proof, or what limits it.
    """

    defense: str
    delta: float | None = None
    prior: float = 0.01
    bound: float | None = None
    epsilon: float | None = None
    bound_note: str = ""
    proved: float | None = None
    proved_rate: float | None = None
    observations: int = 0
    confidence: float | None = None
    proof_note: str = ""

    @property
    def broken(self) -> bool:
        """Whether canaries prove more than is claimed."""
        return self.proved is not None and self.epsilon is not None and self.proved > self.epsilon
