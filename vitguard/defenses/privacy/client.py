"""User-level differential privacy: clip and noise the whole update."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitguard.core import Traits, Update
from vitguard.defenses.base import Defense, Draws, Ledgered, UpdateDefense
from vitguard.defenses.privacy.accounting import Ledger, PrivacySpent, noise_for, noisy
from vitguard.defenses.privacy.checks import check_mechanism
from vitguard.defenses.privacy.reconstruction import reconstruction_bound
from vitguard.errors import Incompatible, Unprotected, expected
from vitguard.vit import Anatomy

__all__ = ["ClientPrivacy"]


@dataclass(frozen=True)
class ClientPrivacy(UpdateDefense, Ledgered):
    """Clip a client's whole update and add Gaussian noise before it leaves.

    Guarantees:
        The clipped update has a 2-norm of at most `clip` over all its tensors together.
        The noise on it has standard deviation `noise * clip` in every coordinate.
        `spent(rounds)` is the exact epsilon at `delta` of that many updates, for replacing nothing
        by the client's whole data set. A guard counts every update that `update` or `seal` returns.
        With a target `epsilon`, no update leaves past `rounds`.

    Does not protect against:
        What the update says of the client within epsilon. One client's noise alone is large
        beside its signal; a server that adds up many updates sees less of it.

    Args:
        clip: Bound C on the norm of one update, above 0.
        epsilon: Target over `rounds`; without it `noise` is used. With neither, noise 1.0.
        delta: Chance that the bound fails, in (0, 1).
        noise: Noise multiplier: standard deviation over `clip`; 0 gives an infinite epsilon.
        rounds: Updates that the client sends in all; past them a target epsilon refuses, while
            with a given `noise` the ledger goes on counting.

    References:
        Geyer et al., arXiv:1712.07557; the exact Gaussian mechanism, arXiv:1805.06530.

    Examples:
        >>> round(ClientPrivacy(noise=5.0, delta=1e-5).spent(10).epsilon, 2)
        2.74
    """

    name: ClassVar[str] = "client-privacy"

    clip: float = 1.0
    epsilon: float | None = None
    delta: float = 1e-5
    noise: float | None = None
    rounds: int = 1

    def __post_init__(self) -> None:
        check_mechanism(self.epsilon, self.noise, self.delta, self.clip)
        if self.rounds < 1:
            raise expected("at least one round", self.rounds)

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Raise Incompatible if an update defense before this one leaves nothing to clip."""
        earlier = stack[: next((i for i, d in enumerate(stack) if d is self), 0)]
        if sealing := [d for d in earlier if d.traits(Traits(), anatomy).sealed]:
            raise Incompatible(
                f"Expected {self.name} before {sealing[0].name}, got it after: what is sealed can "
                "neither be clipped nor noised. Put ClientPrivacy first."
            )

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return that tensors are no longer exact, where there is noise, and what they tell."""
        return noisy(before, self.multiplier)

    @property
    def multiplier(self) -> float:
        """The noise multiplier in use."""
        if self.epsilon is None:
            return 1.0 if self.noise is None else self.noise
        return _calibrated(self.epsilon, self.delta, self.rounds)

    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return the update clipped as a whole, with noise on every tensor.

        Integers, such as the counters of batch norms and schedules, are sealed: they can neither
        be clipped nor noised, and the server does not need them.
        """
        tensors = {k: t for k, t in update.tensors.items() if t.is_floating_point()}
        counters = [k for k in update.tensors if k not in tensors]
        update = update.seal(dict.fromkeys(counters, "an integer, which cannot be noised"))
        if not tensors:
            return update
        return replace(update, tensors={**update.tensors, **self.release(tensors, draws)})

    def release(self, tensors: Mapping[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """Return tensors of floating point clipped as a whole, with noise on every one.

        Raises:
            InputError: A value is not finite.
        """
        norm = math.hypot(*(float(t.double().norm()) for t in tensors.values()))
        if not math.isfinite(norm):
            raise expected("a finite update", f"a norm of {norm}")
        factor = self.clip / max(norm, self.clip)
        clipped = {k: t.double() * factor for k, t in tensors.items()}
        noised = draws.noised_all(clipped, self.multiplier * self.clip)
        return {k: t.to(tensors[k].dtype) for k, t in noised.items()}

    def mimic(self, dummy: Mapping[str, Tensor], seen: Update) -> dict[str, Tensor]:
        """Clip a dummy update as a whole, sealed tensors included; the noise has mean zero."""
        squares = [t.square().sum() for t in dummy.values() if t.is_floating_point()]
        factor = self.clip / torch.stack(squares).sum().clamp_min(self.clip**2).sqrt()
        return {k: t * factor if t.is_floating_point() else t for k, t in dummy.items()}

    def ledger(self) -> Ledger:
        """Return an empty ledger of sent updates."""
        return Ledger()

    def admit(self, ledger: Ledger) -> None:
        """Raise Unprotected if the target epsilon does not cover one more update."""
        self._admit(Ledger([*ledger.history, (self.multiplier, 1.0, 1)]))

    def record(self, ledger: Ledger, *, void: str = "") -> None:
        """Write one sent update into the ledger; updates compose exactly.

        Raises:
            Unprotected: The target epsilon does not cover another update.
        """
        ledger.spend(self.multiplier, 1.0, admit=self._admit, void=void)

    def _admit(self, longer: Ledger) -> None:
        if self.epsilon is not None and (
            longer.steps > self.rounds or longer.spent(self.delta).epsilon > self.epsilon
        ):
            raise Unprotected(
                f"Expected at most {self.rounds} updates for epsilon {self.epsilon:g}, got one "
                "more. Set rounds to all that will be sent, before the first."
            )

    def privacy_spent(self, ledger: Ledger) -> PrivacySpent:
        """Return what the updates in the ledger add up to, for one whole client."""
        return ledger.statement(self.delta)

    def one_update(self, steps: int) -> tuple[Ledger, float]:
        """Return a ledger of one update alone and delta: its local steps are one release."""
        return Ledger([(self.multiplier, 1.0, 1)]), self.delta

    def reconstruction_bound(self, prior: float, steps: int) -> float:
        """Return the most often that an attack on one update reconstructs a record in it.

        The local steps are one release; what holds for all of a client's data holds for a record.
        """
        return reconstruction_bound(prior, self.multiplier, 1)

    def spent(self, rounds: int | None = None) -> PrivacySpent:
        """Return what `rounds` updates spend (by default all that are planned)."""
        ledger = Ledger()
        ledger.record(self.multiplier, 1.0, self.rounds if rounds is None else rounds)
        return ledger.spent(self.delta)


@functools.lru_cache(maxsize=64)
def _calibrated(epsilon: float, delta: float, rounds: int) -> float:
    return noise_for(epsilon, delta, 1.0, rounds)
