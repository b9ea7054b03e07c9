"""FGSM: one signed step on the input of a trained model, in pixel units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitguard.attacks._base import InputAttack, InputResult, Triptych
from vitguard.core import Normalization
from vitguard.errors import expected
from vitguard.vit import logits_of

__all__ = ["FGSM", "train_surrogate"]

Pixels = Float[Tensor, "batch channels height width"]
_CHUNK = 64  # images per forward pass; accuracy is the same for any value


@dataclass(frozen=True)
class FGSM(InputAttack):
    """x' = clip(x + ε sign(∇_x J(x, y)), 0, 1); targeted: minus, with the label aimed at.

    Args:
        epsilon: Bound on the change of a pixel, in pixel units of [0, 1] even when the model
            normalises; several are tried one by one.
        targeted: Aim at a class instead of away from the true one. In `evaluate` the target is a
            wrong class drawn for each image.
        examples: How many triptychs `evaluate` returns.
        surrogate: The adversary's own model, which takes the gradient in place of the attacked one
            (transfer: a black box); None is white-box.

    References:
        Goodfellow et al., arXiv 1412.6572, section 4.
    """

    name: ClassVar[str] = "fgsm"

    epsilon: float | tuple[float, ...] = 8 / 255
    targeted: bool = False
    examples: int = 4
    surrogate: nn.Module | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.epsilons or not all(0 <= e <= 1 for e in self.epsilons):
            raise expected("epsilon in [0, 1], in pixel units", self.epsilon)
        if self.examples < 0:
            raise expected("examples of at least 0", self.examples)

    @property
    def epsilons(self) -> tuple[float, ...]:
        """Every epsilon, one or more."""
        return self.epsilon if isinstance(self.epsilon, tuple) else (float(self.epsilon),)

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, for the report."""
        return {
            "epsilon": self.epsilon,
            "targeted": self.targeted,
            "examples": self.examples,
            "surrogate": None if self.surrogate is None else type(self.surrogate).__name__,
        }

    def perturb(
        self,
        model: nn.Module,
        images: Pixels,
        labels: Int[Tensor, " batch"],
        *,
        normalization: Normalization | None = None,
    ) -> Pixels:
        """Return adversarial pixels for one epsilon.

        Args:
            model: The attacked model; the gradient comes from `surrogate` when there is one.
            images: Pixels in [0, 1].
            labels: True classes, or the classes aimed at when `targeted`.
            normalization: From pixels to the model's input; None for a model that takes pixels.

        Raises:
            InputError: Pixels outside [0, 1], or several epsilons (`evaluate` takes them).
        """
        if len(self.epsilons) != 1:
            raise expected("one epsilon", self.epsilons, "Use evaluate for a list.")
        sign = self._direction(model, images, labels, normalization)
        return (images + self.epsilons[0] * sign).clamp(0, 1)

    def evaluate(
        self,
        model: nn.Module,
        images: Pixels,
        labels: Int[Tensor, " batch"],
        *,
        normalization: Normalization | None = None,
        generator: torch.Generator | None = None,
    ) -> InputResult:
        """Return clean and robust accuracy for each epsilon, with examples at the largest.

        A targeted attack also reports how often it reached its target.
        """
        aims = labels
        if self.targeted:
            aims = _wrong_classes(model, images, labels, normalization, generator)
        sign = self._direction(model, images, aims, normalization)
        clean = _scores(model, images, normalization)
        robust, hits = {}, {}
        for epsilon in self.epsilons:
            after = _scores(model, (images + epsilon * sign).clamp(0, 1), normalization)
            robust[epsilon] = _share(after.argmax(-1) == labels)
            if self.targeted:
                hits[epsilon] = _share(after.argmax(-1) == aims)
        largest = max(self.epsilons)
        shown = (images + largest * sign).clamp(0, 1)[: self.examples]
        after = _scores(model, shown, normalization) if len(shown) else clean[:0]
        examples = tuple(
            Triptych(
                image=images[i].detach().cpu(),
                adversarial=shown[i].detach().cpu(),
                epsilon=largest,
                label=int(aims[i]),
                before=_said(clean[i]),
                after=_said(after[i]),
            )
            for i in range(len(shown))
        )
        return InputResult(
            clean_accuracy=_share(clean.argmax(-1) == labels),
            robust_accuracy=robust,
            target_hits=hits,
            examples=examples,
            details={
                "threat": "transfer" if self.surrogate is not None else "white-box",
                "gain of the shown perturbation": examples[0].gain if examples else None,
            },
        )

    def _direction(
        self,
        model: nn.Module,
        images: Pixels,
        labels: Tensor,
        normalization: Normalization | None,
    ) -> Pixels:
        _check_pixels(images)
        if len(labels) != len(images):
            raise expected(f"{len(images)} labels", len(labels))
        source = model if self.surrogate is None else self.surrogate
        signs = []
        with _frozen(source):
            parts = zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True)
            for pixels, targets in parts:
                leaf = pixels.detach().clone().requires_grad_()
                scores = logits_of(source(_inputs(leaf, normalization)))
                # A sum: the sign does not depend on how the batch is cut.
                loss = F.cross_entropy(scores, targets, reduction="sum")
                signs.append(torch.autograd.grad(loss, leaf)[0].sign())
        return -torch.cat(signs) if self.targeted else torch.cat(signs)


def train_surrogate(
    answer: Callable[[Pixels], Tensor],
    surrogate: nn.Module,
    images: Pixels,
    *,
    normalization: Normalization | None = None,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Train `surrogate`, in place, to answer like a black box that only answers queries.

    Each image is queried once. Answers may be class indices, shape (batch,), or probabilities,
    shape (batch, classes). Images are flipped left to right at random while training.

    Args:
        answer: The black box: pixels in [0, 1] to answers. It is never differentiated.
        surrogate: A model with as many classes, on the device of `images`.
        images: The adversary's own pixels in [0, 1]; none of the victim's data is needed.
        normalization: From pixels to the surrogate's input; None for a model that takes pixels.
        learning_rate: Of AdamW, cosine decay to 0.
        generator: Order and flips.

    Returns:
        The surrogate in eval mode.
    """
    _check_pixels(images)
    if epochs < 1 or batch_size < 1 or not 0 < learning_rate < math.inf:
        raise expected(
            "epochs and batch_size of at least 1 and a learning rate above 0",
            (epochs, batch_size, learning_rate),
        )
    with torch.no_grad():
        answers = torch.cat([answer(part).detach() for part in images.split(_CHUNK)])
    optimizer = torch.optim.AdamW(surrogate.parameters(), lr=learning_rate)
    steps = epochs * math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    surrogate.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(batch_size):
            pixels = images[chosen.to(images.device)]
            flip = torch.rand(len(pixels), generator=generator).to(pixels.device) < 0.5
            pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
            scores = logits_of(surrogate(_inputs(pixels, normalization)))
            optimizer.zero_grad()
            F.cross_entropy(scores, answers[chosen.to(answers.device)]).backward()
            optimizer.step()
            schedule.step()
    return surrogate.eval()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Take the gradient of the model that is deployed: eval mode, put back afterwards."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _inputs(pixels: Pixels, normalization: Normalization | None) -> Tensor:
    return pixels if normalization is None else normalization.apply(pixels)


def _scores(model: nn.Module, images: Pixels, normalization: Normalization | None) -> Tensor:
    with torch.no_grad(), _frozen(model):
        parts = [logits_of(model(_inputs(p, normalization))) for p in images.split(_CHUNK)]
    return torch.cat(parts).softmax(-1)


def _wrong_classes(
    model: nn.Module,
    images: Pixels,
    labels: Tensor,
    normalization: Normalization | None,
    generator: torch.Generator | None,
) -> Tensor:
    classes = _scores(model, images[:1], normalization).shape[-1]
    if classes < 2:
        raise expected("a model with two classes or more", classes)
    shift = torch.randint(1, classes, labels.shape, generator=generator).to(labels.device)
    return (labels + shift) % classes


def _check_pixels(images: Tensor) -> None:
    if images.dim() != 4 or not images.is_floating_point() or not len(images):
        raise expected(
            "floating pixels of shape (batch, channels, height, width)",
            f"{images.dtype} of shape {tuple(images.shape)}",
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise expected(
            "pixels in [0, 1]",
            f"[{low:.3g}, {high:.3g}]",
            "Undo the model's normalisation and pass it as `normalization`.",
        )


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _said(scores: Tensor) -> tuple[int, float]:
    confidence, index = scores.max(-1)
    return int(index), float(confidence)
