"""The strongest canary audit: who knows each canary's direction sees a Gaussian in every release.

Many canaries with orthogonal gradients go through one release, each in or out by a coin. The
adversary knows all but the coins. So of each canary it sees 0 or 1 clip, plus the noise along its
direction. A few releases give thousands of observations, and these a lower bound on signal over
noise, which composes to a lower bound on epsilon.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitguard.core import Batch
from vitguard.defenses.base import Defense
from vitguard.defenses.privacy.accounting import Entry, Ledger
from vitguard.defenses.privacy.client import ClientPrivacy
from vitguard.defenses.privacy.defense import DifferentialPrivacy
from vitguard.defenses.privacy.trade_off import power_of
from vitguard.defenses.privacy.verification import separation
from vitguard.draws import Draws
from vitguard.errors import expected

__all__ = ["NoiseProof", "Seen", "canary_scores", "prove_noise"]

_LEAST = 20  # observations on each side
_RELEASES, _CANARIES = 24, 512  # of records
_UPDATES, _DIRECTIONS = 800, 8  # of clients


@dataclass(frozen=True)
class NoiseProof:
    """What canaries prove of a Gaussian mechanism, with the given confidence.

    Args:
        mu: Lower bound on clip over standard deviation of the noise, in one release.
        ratio: `mu` as estimated, without the margin.
        rate: Lower bound on the rate at which records are sampled; 1.0 where none are.
        observations: Canaries times releases.
        confidence: Chance in (0, 1) that the bounds hold together.
    """

    mu: float
    ratio: float
    rate: float
    observations: int
    confidence: float

    def entries(self, steps: int) -> list[Entry]:
        """Return the least that so many releases add to a ledger: (noise, rate, steps)."""
        return [(1 / self.mu, self.rate, steps)] if self.mu > 0 and self.rate > 0 else []

    def epsilon(self, delta: float, steps: int = 1) -> float:
        """Return the lower bound on epsilon of so many releases at `delta` in (0, 1).

        By the ledger's accountant: exact without sampling, and with it above the truth by its own
        margin of about 1 %, as every claim is that it is compared with.
        """
        return Ledger(self.entries(steps)).spent(delta).epsilon

    def power(self, false_positives: float, steps: int = 1) -> float:
        """Return the true positive rate, in [0, 1], that a test for one record reaches at least."""
        return power_of(self.entries(steps))(false_positives)


def prove_noise(
    scores: Float[Tensor, "*any"],
    present: Bool[Tensor, "*any"],
    *,
    sampled: bool = False,
    confidence: float = 0.95,
) -> NoiseProof:
    """Return what the scores of canaries prove, over all canaries and steps together.

    The bound on `mu` is that of two samples of normal scores with one variance: independent,
    because the canaries' gradients are orthogonal and the noise is fresh in each release. Noise of
    another law, or noise that one release takes from another, needs `canary_audit`. That steps
    compose, by Poisson sampling where there is any, is taken from the mechanism.

    Args:
        scores: Of each canary in each release what is left without the other records, projected on
            its clipped gradient in units of its norm squared: mean 0 without it, 1 with it. Any
            shape, such as (steps, canaries).
        present: Whether the canary was in that release; the same shape, boolean.
        sampled: Whether `present` was drawn by the mechanism's own sampling, whose rate is then
            bounded as well (Clopper and Pearson). Otherwise by a coin, and the rate counts as 1.
        confidence: Chance in (0, 1) that the bounds hold.

    Raises:
        InputError: Fewer than 20 observations with or without a canary, or unequal shapes.

    Reference: Nasr et al., arXiv:2302.07956: white-box audit of each step, composed.
    """
    if scores.shape != present.shape or present.dtype != torch.bool or not 0 < confidence < 1:
        raise expected(
            "scores and booleans of one shape and a confidence in (0, 1)",
            f"{tuple(scores.shape)}, {tuple(present.shape)} {present.dtype}, {confidence}",
        )
    there, total = int(present.sum()), present.numel()
    if min(there, total - there) < _LEAST:
        raise expected(
            f"at least {_LEAST} observations with and without a canary",
            f"{there} and {total - there}", "Use more canaries or more steps.",
        )  # fmt: skip
    failure = (1 - confidence) / (2 if sampled else 1)
    values = scores.double()
    mu, ratio = separation(values[~present], values[present], failure)
    rate = 1.0
    if sampled:
        from scipy.stats import beta

        rate = float(beta.ppf(failure, there, total - there + 1))
    return NoiseProof(mu, ratio, rate, total, confidence)


class Seen(NamedTuple):
    """Scores of canaries and whether each was there, both of shape (releases, canaries)."""

    scores: Tensor
    present: Tensor


@functools.singledispatch
def canary_scores(defense: Defense, draws: Draws) -> Seen:
    """Release canaries through a private defense, a small linear model in place of the user's.

    Its own code clips and noises, with its own settings. Other defenses of a stack take no part.

    Raises:
        InputError: There are no canaries for this kind of defense.
    """
    raise expected("a defense that canaries are known for", defense.name)


@canary_scores.register
def _of_records(defense: DifferentialPrivacy, draws: Draws) -> Seen:
    """Records of one-hot features through the gradient of `Guard.update`."""
    layer = nn.Linear(_CANARIES, 2, bias=False)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(nn.Flatten(), layer)
    features = torch.eye(_CANARIES)[..., None, None] * 4 * max(defense.clip, 1.0)
    labels = torch.arange(_CANARIES) % 2
    own = (0.5 - F.one_hot(labels, 2).float()).T * 2**0.5  # each of norm 1
    present = torch.from_numpy(draws.uniform(_RELEASES * _CANARIES) < 0.5).view(_RELEASES, -1)
    scores = torch.empty(_RELEASES, _CANARIES)
    for coins, row in zip(present, scores, strict=True):
        batch = Batch(features[coins], labels[coins])
        released = defense.gradient(model, F.cross_entropy, batch, draws)["1.weight"]
        row.copy_((released.double() * int(coins.sum()) * own).sum(0) / defense.clip)
    return Seen(scores, present)


@canary_scores.register
def _of_clients(defense: ClientPrivacy, draws: Draws) -> Seen:
    """Updates through what `seal` releases, each along one of a few directions."""
    chosen = torch.from_numpy(draws.words(_UPDATES) % _DIRECTIONS).long()
    present = F.one_hot(chosen, _DIRECTIONS).bool()
    scores = torch.empty(_UPDATES, _DIRECTIONS)
    for there, row in zip(present, scores, strict=True):
        own = {"weight": there.double() * 10 * defense.clip}
        row.copy_(defense.release(own, draws)["weight"] / defense.clip)
    return Seen(scores, present)
