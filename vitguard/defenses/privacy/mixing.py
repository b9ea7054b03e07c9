"""Mixup, CutMix and their like, which put two records into one example: refused.

Clipping bounds what one example adds, so an example of two records voids the bound. A collate
function, and a data set that reads batches, are tried out on a few records. Mixing that happens
later shows in the targets: the gradient at the class scores tells them, whatever the criterion
looks like.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from vitguard.core import Batch
from vitguard.defenses.base import BatchDefense, Defense, Draws
from vitguard.defenses.privacy.holders import tensors_of
from vitguard.errors import Incompatible, Unprotected
from vitguard.vit import Anatomy

__all__ = ["refuse_mixed_targets", "refuse_mixing_collate", "refuse_mixing_defenses"]

_TRIES = 16  # a mixing that happens in one of five batches goes unseen in 3 of 100 trials
_FEW = 4  # classes below which smoothed labels and mixed ones look alike
_SEVERAL = 8  # the same where an example may have several classes
_VOTES = 20  # annotators whose shares are no mixture: thirds, tenths
_REMEDY = "Leave mixup and CutMix out: what changes one image alone (crop, flip, erase) may stay."


def refuse_mixing_collate(collate: Callable[[list[Any]], Any], dataset: Any, records: Any) -> None:
    """Raise Incompatible if the first example of a batch depends on the others in it.

    A data set that reads a batch at once (`__getitems__`, as those of the hub do) may mix as well.
    It is asked with equal draws of torch, numpy and Python; where it draws from elsewhere it is not
    told.

    Args:
        records: Indices of `dataset` that are trained on.
    """
    if len(records) < 3:
        return
    chosen = [records[i * (len(records) - 1) // 6] for i in range(7)]
    together, others = chosen[:4], [chosen[0], *chosen[4:]]
    if reads_batches(dataset) and _repeats(collate, dataset, together):
        for seed in range(_TRIES):
            with _seeded(seed):
                first = _first_rows(collate, dataset.__getitems__(together))
            with _seeded(seed):
                second = _first_rows(collate, dataset.__getitems__(others))
            _refuse_other(
                first, second, "a data set and collate function that keep", "ones that mix"
            )
        return
    read = {i: dataset[i] for i in dict.fromkeys(chosen)}
    with _seeded(0):
        made = collate([read[i] for i in together])
    if not tensors_of(made):
        raise Incompatible(
            "Expected a collate function whose tensors can be found in what it returns, to see "
            f"that it keeps each example to itself, got a {type(made).__name__} without any. "
            "Return tensors in a dictionary, a tuple or an object's attributes."
        )
    for seed in range(_TRIES):
        with _seeded(seed):
            first = _first_rows(collate, [read[i] for i in together])
        with _seeded(seed):
            second = _first_rows(collate, [read[i] for i in others])
        _refuse_other(first, second, "a collate function that keeps", "one that mixes")


def reads_batches(dataset: Any) -> bool:
    """Whether a loader asks a data set for all examples of a batch at once."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


def _repeats(collate: Any, dataset: Any, indices: Sequence[int]) -> bool:
    made = []
    for _ in range(2):
        with _seeded(0):
            made.append(_first_rows(collate, dataset.__getitems__(indices)))
    return _alike(made[0], made[1])


def _refuse_other(first: Sequence[Tensor], second: Sequence[Tensor], wanted: str, got: str) -> None:
    if not _alike(first, second):
        raise Incompatible(
            f"Expected {wanted} each example to itself, got {got} examples: clipping would bound "
            f"what two records add together. {_REMEDY}"
        )


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(_same, first, second))


def refuse_mixing_defenses(stack: Sequence[Defense], anatomy: Anatomy) -> None:
    """Raise Incompatible if what a defense of the batch makes of an example depends on the others.

    Clipping each example's gradient bounds nothing then. Tried out on noise, with equal draws.
    """
    shape = (4, anatomy.channels, *anatomy.image_size)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    classes = anatomy.classes or 2
    labels = torch.arange(4) % classes, (1 + 2 * torch.arange(4)) % classes
    one, other = (Batch(i.clone(), t.clone()) for i, t in zip(noise, labels, strict=True))
    other.images[0], other.labels[0] = one.images[0], one.labels[0]
    for defense in (d for d in stack if isinstance(d, BatchDefense)):
        for seed in range(_TRIES):
            made = [_transformed(defense, batch, seed) for batch in (one, other)]
            if any(len(m.labels) != 4 or len(m.images) != 4 for m in made) or not (
                _same(made[0].images[0], made[1].images[0])
                and _same(made[0].labels[0], made[1].labels[0])
            ):
                raise Incompatible(
                    f"Expected defenses of the batch that keep each example to itself, got "
                    f"{defense.name}, which mixes examples: clipping would bound what two records "
                    f"add together. Leave {defense.name} out."
                )


def _transformed(defense: BatchDefense, batch: Batch, seed: int) -> Batch:
    """Return what a defense makes of a batch with the draws of a seed, whatever it draws from."""
    given = Batch(batch.images.clone(), batch.labels.clone())
    with _seeded(seed):
        return defense.transform(given, Draws(torch.Generator().manual_seed(seed)))


def _first_rows(collate: Any, batch: Sequence[Any]) -> list[Tensor]:
    return [t[0] for t in tensors_of(collate(list(batch))) if t.dim()]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let a collate function of any library draw from this seed, and leave no trace of it."""
    numpy, python = np.random.get_state(), random.getstate()  # noqa: NPY002 - what collates use
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # a batch is put together on the CPU
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy)  # noqa: NPY002
            random.setstate(python)


def refuse_mixed_targets(scores: Tensor, gradient: Tensor) -> None:
    """Raise Unprotected if a gradient at class scores is that of targets with two classes.

    Cross-entropy against targets t has the gradient w (softmax(scores) - t), its binary form
    w (sigmoid(scores) - t), whether t is one soft target or two criteria were weighted. A target
    is mixed if exactly two classes stand out above a flat rest; a smoothed label has one. Where
    some weight w makes one class stand out in every row, that is what the loss was: with another
    weight a model that is sure of two classes looks like a mixed target. Of two or three classes
    nothing is told. Two targets of several classes each, mixed by shares of a and 1 - a, leave rows
    of 0, a, 1 - a and 1 (their sums in softmax's form): told from eight classes on, where a is no
    share of few annotators' votes. Gradients in half precision are too coarse to try weights on:
    there only the mean of cross-entropy is looked at, with second shares of more than a tenth.

    Args:
        scores: Shape (batch, classes).
        gradient: Of the loss, as large.
    """
    if scores.dim() != 2 or scores.shape[1] < _FEW or not bool(gradient.any()):
        return
    z, g = scores.detach().double(), gradient.double()
    fine = gradient.dtype in (torch.float32, torch.float64)
    rounding, least = (2e-5, 0.01) if fine else (1e-2, 0.1)
    soft, binary = z.softmax(1), z.sigmoid()
    tried = [(soft, [float(len(z))])]
    if fine:
        tried[0][1].extend([1.0, _ratio(soft, g)])
        tried.append((binary, [z.numel(), len(z), 1.0, _ratio(binary, g)]))
    taken = g.any(1)  # the others have no part in the loss
    for chances, sizes in tried:
        targets = [(chances - g * size)[taken] for size in sizes]
        if any(_alone(t, rounding) for t in targets):
            continue
        if any(_mixed(chances[taken], t, rounding, least) for t in targets) or (
            fine and any(_sets_mixed(t, one_sum=chances is soft) for t in targets)
        ):
            raise Unprotected(
                "Expected a label of one class for each example, got targets that mix two "
                f"(mixup, CutMix): an example would hold two records. {_REMEDY}"
            )


def _sets_mixed(values: Tensor, *, one_sum: bool) -> bool:
    """Whether some row is a mixture of two targets of several classes, and no row is anything else.

    Args:
        one_sum: The classes of a target share 1, in place of 1 for each.
    """
    classes, near = values.shape[1], 2e-4
    if classes < _SEVERAL or not bool(((values > -near) & (values < 1 + near)).all()):
        return False
    ordered = values.sort(1).values
    apart = ordered.diff(dim=1) > near
    levels = apart.sum(1) + 1
    # with another weight than that of the loss the values of a row are all different
    if not 3 <= int(levels.max()) <= 4:
        return False
    for row, steps in zip(ordered[levels > 2], apart[levels > 2], strict=True):
        starts = [0, *(steps.nonzero()[:, 0] + 1).tolist(), classes]
        sizes = [b - a for a, b in itertools.pairwise(starts)]
        heights = [float(row[a:b].mean()) for a, b in itertools.pairwise(starts)]
        if _is_pair(sizes, heights, near, one_sum=one_sum):
            return True
    return False


def _is_pair(sizes: Sequence[int], heights: Sequence[float], near: float, *, one_sum: bool) -> bool:
    """Whether the levels of a row, from the lowest, are those of two mixed sets of classes."""
    low, one, other = heights[:3]
    if one_sum:
        whole = 1 - low * sum(sizes)
        share = (one - low) * sizes[1] / whole
        rest = (other - low) * sizes[2] / whole
        if len(heights) > 3 or sizes[1] + sizes[2] < 3:
            return False
    else:
        top = heights[3] if len(heights) > 3 else 1 - low
        share, rest = (one - low) / (top - low), (other - low) / (top - low)
    counted = min(abs(share * n - round(share * n)) / n for n in range(1, _VOTES + 1))
    return abs(share + rest - 1) < 2 * near and min(share, rest) > 0.01 and counted > near / 2


def _ratio(chances: Tensor, gradient: Tensor) -> float:
    """Return chances over gradient, as most classes have it: those that the target leaves out."""
    known = gradient != 0
    return float((chances[known] / gradient[known]).median())


def _targets(values: Tensor, rounding: float) -> Tensor:
    """Return which rows are shares that add up to 1, shape (batch,)."""
    inside = ((values > -rounding) & (values < 1 + rounding)).all(1)
    return inside & ((values.sum(1) - 1).abs() < rounding * values.shape[1])


def _alone(values: Tensor, rounding: float) -> bool:
    """Whether each row of `values` is a target in which one class stands out of a flat rest."""
    ordered = values.sort(1, descending=True).values
    alone = (_spread(ordered[:, 1:]) < rounding) & (ordered[:, 0] - ordered[:, 1] > 10 * rounding)
    return bool((alone & _targets(values, rounding)).all())


def _mixed(chances: Tensor, values: Tensor, rounding: float, least: float) -> bool:
    """Whether some row of `values` is a target with two classes above the rest, and no chance.

    The weight that was tried is that of the loss only if it makes a target of every row: with four
    classes and a wrong weight, single rows are flat by chance.

    Args:
        least: How far the second class stands out.
    """
    order = values.argsort(1, descending=True)
    ordered, before = values.gather(1, order), chances.gather(1, order)
    rest, rest_before = ordered[:, 2:], before[:, 2:]
    flat = (_spread(rest) < rounding) & _targets(values, rounding)
    if not bool(flat.all()):
        return False
    # a rest that is flat by itself, in a model that is sure already, proves nothing
    unsure = chances.amax(1) < 3 / chances.shape[1]
    proven = (_spread(rest_before) > 10 * rounding) | unsure
    stand_out = ordered[:, 1] - rest[:, 0] > least
    moved = ((ordered - before)[:, :2].abs() > 0.01).all(1)
    return bool((proven & stand_out & moved).any())


def _spread(values: Tensor) -> Tensor:
    return values.amax(1) - values.amin(1)
