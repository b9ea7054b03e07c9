"""What differential privacy is asked for, and what its releases may spend."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from vitguard.defenses.base import Ledgered, StepDefense
from vitguard.defenses.privacy.accounting import Ledger, PrivacySpent, noise_for
from vitguard.defenses.privacy.checks import check_mechanism
from vitguard.defenses.privacy.clipping import Clipping, check_clipping
from vitguard.defenses.privacy.reconstruction import reconstruction_bound
from vitguard.errors import Unprotected, expected

__all__ = ["PrivacyTarget"]


@dataclass(frozen=True)
class PrivacyTarget(StepDefense, Ledgered):
    """The settings of `DifferentialPrivacy`, which says what each means, and their account.

    Raises:
        InputError: A value out of range, or both `epsilon` and `noise`.
    """

    epsilon: float | None = None
    delta: float = 1e-5
    clip: float = 1.0
    noise: float | None = None
    epochs: float | None = None
    engine: Literal["bookkeeping", "opacus"] = "bookkeeping"
    accountant: Literal["prv", "rdp"] = "prv"
    physical_batch: int | None = None
    clipping: Clipping = "flat"

    def __post_init__(self) -> None:
        check_mechanism(self.epsilon, self.noise, self.delta, self.clip)
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise expected("epochs above 0", self.epochs)
        if self.engine not in ("bookkeeping", "opacus"):
            raise expected("engine bookkeeping or opacus", repr(self.engine))
        if self.accountant not in ("prv", "rdp"):
            raise expected("accountant prv or rdp", repr(self.accountant))
        check_clipping(self.clipping)
        if self.physical_batch is not None and self.physical_batch < 1:
            raise expected("physical_batch of at least 1", self.physical_batch)

    def ledger(self) -> Ledger:
        """Return an empty ledger of releases."""
        return Ledger()

    def admit(self, ledger: Ledger) -> None:
        """Raise Unprotected if the target epsilon does not cover one more release of `gradient`."""
        self._admit_update(Ledger([*ledger.history, (self._release_noise(), 1.0, 1)]))

    def record(self, ledger: Ledger, *, void: str = "") -> None:
        """Write one release of `gradient`; as all examples take part, sampling amplifies nothing.

        Raises:
            Unprotected: The target epsilon does not cover another release.
        """
        ledger.spend(self._release_noise(), 1.0, admit=self._admit_update, void=void)

    def _admit_update(self, longer: Ledger) -> None:
        self.refuse_beyond_target(longer, (self._release_noise(), 1.0, math.ceil(self.epochs or 1)))

    def refuse_beyond_target(self, ledger: Ledger, planned: tuple[float, float, int]) -> None:
        """Raise Unprotected if a ledger spends more than the target epsilon.

        Args:
            planned: Noise, rate and number of the releases that the target was planned for; a
                ledger of fewer such releases needs no accountant.
        """
        if self.epsilon is None:
            return
        noise, rate, steps = planned
        if all(n >= noise and r <= rate for n, r, _ in ledger.history) and ledger.steps <= steps:
            return
        if (spent := ledger.spent(self.delta, self.accountant)).epsilon > self.epsilon:
            raise Unprotected(
                f"Expected at most epsilon {self.epsilon:g}, got a step that would make it "
                f"{spent.epsilon:.4g} after {ledger.steps} steps; nothing was released. Protect "
                "with more epochs from the start, or with noise in place of epsilon."
            )

    def require_covered(self, ledger: Ledger) -> None:
        """Raise Unprotected if a ledger has spent more than the target epsilon."""
        spent = ledger.spent(self.delta, self.accountant).epsilon if self.epsilon else 0.0
        if self.epsilon and spent > self.epsilon:
            raise Unprotected(
                f"Expected at most epsilon {self.epsilon:g}, got {spent:.4g} after {ledger.steps} "
                "steps, those of earlier rounds among them; nothing was released. Load the saved "
                "state (in Flower: attach) before prepare, so that training stops in time."
            )

    def privacy_spent(self, ledger: Ledger) -> PrivacySpent:
        """Return what the releases in the ledger add up to."""
        return ledger.statement(self.delta, self.accountant)

    def one_update(self, steps: int) -> tuple[Ledger, float]:
        """Return a ledger of one update alone and delta: each local step is a release."""
        return Ledger([(self._release_noise(), 1.0, steps)]), self.delta

    def reconstruction_bound(self, prior: float, steps: int) -> float:
        """Return the most often that an attack on one update reconstructs one of its records.

        Each local step releases the whole batch's noised gradient, so nothing is amplified by
        sampling. Without noise it is 1.0: no bound.
        """
        return reconstruction_bound(prior, self._release_noise(), steps)

    def audit_note(self) -> str:
        """Say which noise a target epsilon came to: training on a loader takes less."""
        if self.epsilon is None:
            return ""
        updates = math.ceil(self.epochs or 1)
        return (
            f"{self.spec()} was audited with noise {self._release_noise():.3g}, enough for "
            f"{updates} update{'s' if updates > 1 else ''} of all records; training on a prepared "
            "loader takes less noise for the same epsilon: audit that with privacy:noise= the "
            "noise_multiplier of its optimizer"
        )

    def multiplier(self, rate: float, steps: int) -> float:
        """Return the noise multiplier for `steps` releases at a Poisson rate."""
        if self.epsilon is None:
            return 1.0 if self.noise is None else self.noise
        return _calibrated(self.epsilon, self.delta, rate, steps, self.accountant)

    def _release_noise(self) -> float:
        return self.multiplier(1.0, math.ceil(self.epochs or 1))


@functools.lru_cache(maxsize=64)
def _calibrated(epsilon: float, delta: float, rate: float, steps: int, accountant: str) -> float:
    return noise_for(epsilon, delta, rate, steps, accountant)
