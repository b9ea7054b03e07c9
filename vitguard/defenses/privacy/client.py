"""User-level differential privacy: clip and noise the whole update."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitguard.core import Update
from vitguard.defenses._base import Defense, Draws, UpdateDefense
from vitguard.defenses.privacy.accounting import Ledger, PrivacySpent, noise_for
from vitguard.errors import Incompatible, expected
from vitguard.vit import Anatomy

__all__ = ["ClientPrivacy"]


@dataclass(frozen=True)
class ClientPrivacy(UpdateDefense):
    """Clip a client's whole update and add Gaussian noise before it leaves.

    Guarantees:
        The clipped update has a 2-norm of at most `clip` over all its tensors together.
        The noise on it has standard deviation `noise * clip` in every coordinate.
        `spent(rounds)` is the exact epsilon at `delta` of that many updates, for replacing nothing
        by the client's whole data set.

    Does not protect against:
        What the update says of the client within epsilon. One client's noise alone is large
        beside its signal; a server that adds up many updates sees less of it.

    Args:
        clip: Bound C on the norm of one update, above 0.
        epsilon: Target over `rounds`; without it `noise` is used. With neither, noise 1.0.
        delta: Chance that the bound fails, in (0, 1).
        noise: Noise multiplier: standard deviation over `clip`; 0 gives an infinite epsilon.
        rounds: Updates that the client sends in all.

    References:
        Geyer et al., arXiv:1712.07557; the exact Gaussian mechanism, arXiv:1805.06530.

    Example:
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
        if self.epsilon is not None and self.noise is not None:
            raise expected("epsilon or noise", "both", "Drop one: the other follows from it.")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise expected("a finite epsilon above 0", self.epsilon)
        if not 0 < self.delta < 1:
            raise expected("delta in (0, 1)", self.delta)
        if not 0 < self.clip < math.inf:
            raise expected("a finite clip above 0", self.clip)
        if self.noise is not None and not 0 <= self.noise < math.inf:
            raise expected("a finite noise multiplier of at least 0", self.noise)
        if self.rounds < 1:
            raise expected("at least one round", self.rounds)

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Raise Incompatible if an update defense before this one leaves nothing to clip."""
        names = [d.name for d in stack]
        if "encryption" in names and names.index("encryption") < names.index(self.name):
            raise Incompatible(
                "Expected client-privacy before encryption, got it after: what is encrypted can "
                "neither be clipped nor noised. Put ClientPrivacy first."
            )

    @property
    def multiplier(self) -> float:
        """The noise multiplier in use."""
        if self.epsilon is None:
            return 1.0 if self.noise is None else self.noise
        return _calibrated(self.epsilon, self.delta, self.rounds)

    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return the update clipped as a whole, with noise on every tensor."""
        tensors = {k: t for k, t in update.tensors.items() if t.is_floating_point()}
        if not tensors:
            return update
        norms = torch.stack([t.double().norm() for t in tensors.values()])
        norm = float(norms.norm())
        if not math.isfinite(norm):
            raise expected("a finite update", f"a norm of {norm}")
        factor = self.clip / max(norm, self.clip)
        deviation = self.multiplier * self.clip
        noised = {k: t * factor + deviation * _normal(t, draws) for k, t in tensors.items()}
        return replace(update, tensors={**update.tensors, **noised})

    def record(self, ledger: Ledger, rounds: int = 1) -> None:
        """Add sent updates to a ledger; it composes them exactly."""
        ledger.record(self.multiplier, 1.0, rounds)

    def spent(self, rounds: int | None = None) -> PrivacySpent:
        """Return what `rounds` updates spend (by default all that are planned)."""
        ledger = Ledger()
        self.record(ledger, self.rounds if rounds is None else rounds)
        return ledger.spent(self.delta)


@functools.lru_cache(maxsize=64)
def _calibrated(epsilon: float, delta: float, rounds: int) -> float:
    return noise_for(epsilon, delta, 1.0, rounds)


def _normal(like: Tensor, draws: Draws) -> Tensor:
    device = draws.generator.device
    noise = torch.randn(like.shape, generator=draws.generator, device=device, dtype=like.dtype)
    return noise.to(like.device)
