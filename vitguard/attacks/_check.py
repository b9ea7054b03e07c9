"""What an adversary can check alone: does a guess explain the update it was made from?"""

from __future__ import annotations

import torch

from vitguard.core import Guess, View
from vitguard.errors import NotApplicable, VitguardError
from vitguard.vit import Anatomy

__all__ = ["mismatch", "require_finite"]


def mismatch(view: View, guess: Guess) -> float | None:
    """Return the relative distance of the update that the guess would make to the one seen.

    Each readable tensor counts alike and its scale does not count (clipping): the root of the mean
    over tensors of 2 (1 - cosine), which is |g' - g| / |g| where the two are close and at most 2.
    Entries that were pruned to zero are left out. None where it cannot be computed: no labels, not
    one image per member of the batch, or a secret draw (a shuffle).
    """
    batch = view.update.batch_size
    labels = guess.labels
    if labels is None or len(labels) != batch or len(guess.images) != batch:
        return None
    if guess.shuffled is not None or "shuffle" in view.settings:
        return None
    try:
        seen = view.gradient(steps=True).update
        parameter = next(view.model.parameters())
        images = view.normalization.apply(guess.images.to(parameter))
        made = view.simulate(images, labels.to(parameter.device), None)
        made = made.as_gradient(view.model, steps=True)
    except VitguardError:
        return None
    anatomy = Anatomy.of(view.model)
    total, count = 0.0, 0
    for name, tensor in seen.tensors.items():
        if name not in made.tensors or anatomy.role(name) == "norm":
            continue
        truth = tensor.detach().double()
        kept = truth != 0
        if not bool(kept.any()):
            continue
        guessed = made.tensors[name].detach().double().to(truth)[kept]
        cosine = torch.nn.functional.cosine_similarity(guessed, truth[kept], dim=0, eps=1e-300)
        total += 2 - 2 * float(torch.nan_to_num(cosine).clamp(-1, 1))
        count += 1
    return (total / count) ** 0.5 if count else None


def require_finite(view: View) -> None:
    """Raise NotApplicable where a readable tensor is not finite, or all are zero."""
    tensors = view.update.tensors.values()
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise NotApplicable("the update is not finite")
    if not any(bool(tensor.any()) for tensor in tensors):
        raise NotApplicable("the update is zero")
