"""Cascade: labels and per-sample last-block gradients of a batch, from the class token alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.budget import ENDLESS, Budget, CutShort
from vitguard.attacks.cascade.separate import LastBlock, Separated, separate
from vitguard.attacks.cascade.tail import Reading, Tail
from vitguard.attacks.equations.head import linear_head
from vitguard.attacks.evidence import check_seconds, require_finite
from vitguard.core import Guess, View
from vitguard.errors import NotApplicable, expected
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy

__all__ = ["Cascade", "Samples", "last_block_samples"]

_EXPLAINED = 0.01  # misfit to the head's gradient of weights that differ


@dataclass(frozen=True)
class Samples:
    """What the last block's MLP says about every image of a batch.

    Args:
        inputs: fc1's inputs l_b of the class tokens, shape (found, width).
        hidden: Their activations, shape (found, hidden).
        gradients: dL_b/d(fc2 output) as it is in the update, 1 / B included, (found, width).
        residual: Relative misfit of each activation to the span of fc2's rows, shape (found,).
        labels: Shape (found,), -1 where no single class explains the gradient, or only with another
            weight in the update than that of the other images.
        weights: Of each image's own gradient in the update: 1 / B when plain.
        reading: Predictions and head inputs of the images, None where none was found.
        cut: Whether the budget ended the search before all were found.
    """

    inputs: Float[Tensor, "found width"]
    hidden: Float[Tensor, "found hidden"]
    gradients: Float[Tensor, "found width"]
    residual: Float[Tensor, " found"]
    labels: Int[Tensor, " found"]
    weights: Float[Tensor, " found"]
    reading: Reading | None
    cut: bool = False

    def where(self, mask: Tensor) -> Samples:
        """Return some of the images."""
        reading = None if self.reading is None else self.reading.where(mask)
        names = ("inputs", "hidden", "gradients", "residual", "labels", "weights")
        some = (getattr(self, name)[mask] for name in names)
        return Samples(*some, reading=reading, cut=self.cut)


@dataclass(frozen=True)
class Cascade(Attack):
    """Separate a batch in the last block of a class-token model; gives labels, not images.

    With class-token pooling only B tokens of the last block reach the loss, so the rows of
    dL/dW_fc1 and dL/dW_fc2 there have rank B: l = V1 m + 0 and act(W1 l + b1) in span(V2) is a
    problem of B unknowns. Many-start Levenberg-Marquardt finds its B solutions, taking out what it
    found (`_separate`). Each image's own gradient lies in the column space of dL/dW_fc2, which only
    the right label and size of the class token explain (`_tail`): the head's gradient is not read.

    The guess has labels and no image: it makes no claim on pixels. `details` has the number of
    samples and their largest residual.

    Args:
        seconds: Budget of work, in nominal seconds (`Budget`).
        accept: Relative residual below which a sample counts as found.

    Raises:
        NotApplicable: No class-token pooling, more than width - 1 images, samples not found, or no
            single class explains them: soft labels, another loss.
        Blocked: A gradient of the last MLP cannot be read.

    References:
        docs/methods.md 2.5b.
    """

    name: ClassVar[str] = "cascade"
    family: ClassVar[str] = "ladder"
    rung: ClassVar[Rung | None] = Rung(30, 60)
    seconds: float = 10.0
    accept: float = 1e-3

    def __post_init__(self) -> None:
        check_seconds(self.seconds)
        if not 0 < self.accept < 0.01:
            raise expected("accept between 0 and 0.01", self.accept)

    def remains(self, plain: Released) -> tuple[Remaining, ...]:
        """Labels and features where the last MLP is plain; labels alone where the head is."""
        return self._features(plain), _labels(plain)

    def _features(self, plain: Released) -> Remaining:
        a = plain.anatomy
        if not a.blocks:
            return plain.without_blocks(self.name)
        if a.pooling != "token":
            why = f"pooling is {a.pooling!r}: the last MLP sees all tokens"
            return Remaining(self.name, False, (), why)
        last = (*a.blocks, *a.readers)[-1]
        found = plain.verdict(
            self.name,
            (f"{last.fc1}.weight", f"{last.fc2}.weight"),
            "the MLP multiplies two branches" if last.gated else _filled(plain),
            "labels and features of each image in a batch, but no images",
        )
        return replace(found, exact=False)

    def share(self, view: View) -> float:
        """Return the share of the ladder's work left; one image needs no labels told apart."""
        return 0.2 if view.update.batch_size > 1 else 0.0

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return the labels of the batch without an image."""
        view = view.gradient()
        require_finite(view)
        budget = Budget.of(self.seconds)
        samples = last_block_samples(view, generator, budget=budget, accept=self.accept)
        found, batch = len(samples.inputs), view.update.batch_size
        if found < batch:
            what = f"{found} of {batch} samples of the last block were found"
            if samples.cut:
                raise CutShort(f"{what} in {self.seconds:g} nominal seconds")
            raise NotApplicable(what)
        if bool((samples.labels < 0).any()):
            raise NotApplicable("no single class explains an image's gradient: a soft label")
        details = {"samples": found, "residual": float(samples.residual.max())}
        none = torch.zeros(0, *view.image_shape)
        return Guess(images=none, labels=samples.labels.sort().values, details=details)


def last_block_samples(
    view: View,
    generator: torch.Generator,
    *,
    budget: Budget = ENDLESS,
    accept: float = 1e-3,
) -> Samples:
    """Return the samples of the last block that were found, at most one per image.

    Without a budget its rounds bound the search.

    Raises:
        NotApplicable: See `Cascade`.
        Blocked: See `Cascade`.
    """
    anatomy = Anatomy.of(view.model)
    batch = view.update.batch_size
    if anatomy.pooling != "token" or not anatomy.prefix_tokens:
        raise NotApplicable(f"needs class-token pooling, got {anatomy.pooling}")
    if batch >= anatomy.width - 1:
        raise NotApplicable(f"{batch} images fill width {anatomy.width}")
    tail = Tail.of(view, anatomy)
    block = LastBlock.of(view, anatomy, tail.scale)
    found = separate(block, tail, generator, accept=accept, budget=budget)
    inputs = found.m @ block.inner.T
    hidden = block.activation.value(block.pre_activations(found.m))
    none = inputs.new_zeros(0)
    if found.reading is None:
        return Samples(inputs, hidden, inputs, found.residual, none.long(), none, None, found.cut)
    labels = found.reading.labels
    if not _explain_the_head(view, found):
        labels = torch.where(found.steady, labels, -1)
    return Samples(
        inputs=inputs,
        hidden=hidden,
        gradients=found.weights[:, None] * found.reading.gradients,
        residual=found.residual,
        labels=labels,
        weights=found.weights,
        reading=found.reading,
        cut=found.cut,
    )


def _explain_the_head(view: View, found: Separated) -> bool:
    """Whether the images with weights of their own (clipped each) make the head's gradient."""
    reading, name = found.reading, f"{linear_head(view)}.weight"
    if reading is None or len(found.m) < view.update.batch_size or not view.update.can_read(name):
        return False
    wrong = reading.predicted - torch.nn.functional.one_hot(
        reading.labels.clamp_min(0), reading.predicted.shape[1]
    )
    made = (found.weights[:, None] * wrong).T @ reading.features
    seen = view.read(name)
    return bool((made - seen).norm() < _EXPLAINED * seen.norm() and (found.weights > 0).all())


def _filled(plain: Released) -> str:
    """Say that the images' own rows leave no complement; empty where they do."""
    batch, width = plain.batch_size, plain.anatomy.width
    return f"{batch} images fill the {width} dimensions" if batch >= width else ""


def _labels(plain: Released) -> Remaining:
    names = [n for n in plain.sizes if plain.anatomy.role(n) == "head"]
    readable = tuple(n for n in names if n in plain.plain)
    if readable:
        why = "the head's gradient tells the labels"
        if any(n.endswith("weight") for n in readable):
            whose = "class token's" if plain.anatomy.pooling == "token" else "pooled"
            why += f", and of one image the {whose} features"
        return Remaining("labels", True, readable, why)
    return Remaining("labels", False, tuple(names), "the head has no plain gradient")
