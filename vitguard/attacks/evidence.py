"""What an adversary can check alone: does a guess explain the update it was made from?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from vitguard.attacks.budget import charge_update
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable, VitguardError, expected
from vitguard.vit import Anatomy

__all__ = ["check_seconds", "likeliest", "mismatch", "require_finite", "surprise"]

_FINEST = 1e-16  # squared relative misfit below which rounding decides
_PIECE = 1 << 17  # numbers in float64 at once: what stays in a core's cache takes half the time


def mismatch(view: View, guess: Guess) -> float | None:
    """Return the relative distance of the update that the guess would make to the one seen.

    Each readable tensor counts alike and its scale does not count (clipping): the root of the mean
    over tensors of 2 (1 - cosine), which is |g' - g| / |g| where the two are close and at most 2.
    Entries that were pruned to zero are left out. None where it cannot be computed: no labels, not
    one image per member of the batch, or a secret draw: a shuffle of which the guess does not know
    the mask. Inside it the order of patches changes no update.
    """
    total, count = 0.0, 0
    anatomy = Anatomy.of(view.model)
    for name, made, seen in _simulated(view, guess):
        if anatomy.role(name) == "norm" or not bool(seen.any()):
            continue
        total += min(_gap(made, seen), 4.0)
        count += 1
    return (total / count) ** 0.5 if count else None


def surprise(view: View, guess: Guess) -> float | None:
    """Return how improbable the update is if the guess is right; lower is better.

    Twice the negative log-likelihood, up to a constant, where each tensor has Gaussian noise of
    unknown size of its own and the update one unknown scale (clipping): sum of n_t log |c g'_t -
    g_t|^2 over tensors t of n_t entries. Where many entries are zero (pruning) their true values
    lie below the smallest one kept, and only the excess counts. It tells damaged candidates apart
    that `mismatch` does not, because it weighs a small noisy tensor like a large clear one. None as
    for `mismatch`.
    """
    parts = [_Part.of(made, seen) for _, made, seen in _simulated(view, guess)]
    parts = [part for part in parts if part.own > 0 and part.power > 0]
    if not parts:
        return None
    scale = 1.0
    for _ in range(5):  # the scale and the noise of each tensor, in turn
        weight = [part.count / part.misfit(scale) for part in parts]
        above = sum(w * part.across for w, part in zip(weight, parts, strict=True))
        scale = above / sum(w * part.own for w, part in zip(weight, parts, strict=True))
    return sum(part.count * math.log(part.misfit(scale)) for part in parts)


def likeliest(view: View, guesses: Mapping[str, Guess]) -> str | None:
    """Return the name of the guess that makes the update most probable, None where none does."""
    scores = {name: surprise(view, guess) for name, guess in guesses.items()}
    known = {name: score for name, score in scores.items() if score is not None}
    return min(known, key=lambda name: known[name]) if known else None


def _pieces(made: Tensor, seen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both in float64, in pieces on a CPU; entries of `made` that were pruned are zero."""
    size = _PIECE if seen.device.type == "cpu" else max(len(seen), 1)
    whole = bool(seen.all())
    for one, other in zip(made.split(size), seen.split(size), strict=True):
        one, other = one.double(), other.double()
        yield one if whole else one * (other != 0), other


def _sum(values: Iterable[Tensor]) -> float:
    return float(torch.stack(list(values)).sum())


def _gap(made: Tensor, seen: Tensor) -> float:
    """Return |made / |made| - seen / |seen||^2 = 2 (1 - cosine), to full precision; 2 for NaN."""
    sizes = [torch.stack([m @ m, s @ s]) for m, s in _pieces(made, seen)]
    one, other = (float(size) ** 0.5 for size in torch.stack(sizes).sum(0))
    one, other = 1 / max(one, 1e-300), 1 / max(other, 1e-300)
    gap = _sum((one * m).sub_(other * s).square_().sum() for m, s in _pieces(made, seen))
    return 2.0 if math.isnan(gap) else gap


class _Part:
    """The inner products of one tensor, made and seen, that its likelihood needs."""

    def __init__(self, own: float, across: float, power: float, excess: float, count: int) -> None:
        self.own, self.across, self.power = own, across, power
        self.excess, self.count = excess, count

    @staticmethod
    def of(made: Tensor, seen: Tensor) -> _Part:
        kept, excess = seen != 0, 0.0
        share = float(kept.sum()) / max(kept.numel(), 1)
        if 0 < share < 0.7:
            over = made[~kept].double().abs() - seen[kept].double().abs().min()
            excess = float(over.clamp_min(0).square().sum())
        sums = [torch.stack([m @ m, m @ s, s @ s]) for m, s in _pieces(made, seen)]
        own, across, power = torch.stack(sums).sum(0).tolist()
        return _Part(own, across, power, excess, seen.numel())

    def misfit(self, scale: float) -> float:
        """|c g' - g|^2, never below rounding."""
        whole = scale * scale * self.own - 2 * scale * self.across + self.power + self.excess
        return max(whole, _FINEST * self.power)


def _simulated(view: View, guess: Guess) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, made, seen), flat and on one device; nothing where it cannot be simulated."""
    batch, labels = view.update.batch_size, guess.labels
    if labels is None or len(labels) != batch or len(guess.images) != batch:
        return
    known: dict[str, Tensor] = {}
    if view.traits.shuffle is not None:
        mask = guess.shuffled
        if mask is None or len(mask) != batch or view.update.local_steps > 1:
            return
        known = {"shuffled": mask}
    try:
        seen = view.gradient(steps=True).update
        parameter = next(view.model.parameters())
        images = view.normalization.apply(guess.images.to(parameter))
        charge_update(view)
        made = view.simulate(images, labels.to(parameter.device), None, **known)
        made = made.as_gradient(view.model, steps=True)
    except VitguardError:
        return
    for name, tensor in seen.tensors.items():
        if name in made.tensors:
            truth = tensor.detach().flatten()
            yield name, made.tensors[name].detach().flatten().to(truth.device), truth


def require_finite(view: View) -> None:
    """Raise NotApplicable where a readable tensor is not finite, or all are zero.

    Raises:
        Blocked: No tensor can be read.
    """
    if not view.update.tensors and view.update.sealed:
        raise Blocked("every tensor of the update", next(iter(view.update.sealed.values())))
    tensors = view.update.tensors.values()
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NotApplicable("the update is not finite")
    if not any(bool(tensor.any()) for tensor in tensors):
        raise NotApplicable("the update is zero")


def check_seconds(seconds: float) -> None:
    """Raise InputError unless a budget is above 0."""
    if not seconds > 0:
        raise expected("seconds above 0", seconds)
