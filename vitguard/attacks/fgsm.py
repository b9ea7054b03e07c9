"""FGSM: one signed step on the input of a trained model, in pixel units."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitguard import data
from vitguard.attacks.base import InputAttack, InputResult, Triptych
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
            normalises; several are tried one by one. 16-bit pixels round the step to their grid.
        targeted: Aim at a class instead of away from the true one. In `evaluate` the target is a
            wrong class drawn for each image.
        examples: How many triptychs `evaluate` returns.
        surrogate: The adversary's own model, of any dtype and device, which takes the gradient in
            place of the attacked one (transfer: a black box); None is white-box.

    The models are left as they are. The gradient is taken in eval mode, of a protected model on a
    copy.

    References:
        Goodfellow et al., arXiv 1412.6572, section 4.
    """

    name: ClassVar[str] = "fgsm"

    epsilon: float | Sequence[float] = 8 / 255
    targeted: bool = False
    examples: int = 4
    surrogate: nn.Module | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        several = isinstance(self.epsilon, list | tuple)
        given = self.epsilon if several else (self.epsilon,)
        if not given or not all(isinstance(e, Real) and 0 <= e <= 1 for e in given):  # type: ignore[union-attr]
            raise expected("epsilon in [0, 1], in pixel units", repr(self.epsilon))
        if self.examples < 0:
            raise expected("examples of at least 0", self.examples)
        values = tuple(map(float, given))  # type: ignore[arg-type]
        object.__setattr__(self, "epsilon", values if several else values[0])

    @property
    def epsilons(self) -> tuple[float, ...]:
        """Every epsilon, one or more."""
        return (self.epsilon,) if isinstance(self.epsilon, int | float) else tuple(self.epsilon)

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
            images: Pixels in [0, 1], of the model's dtype and on its device.
            labels: True classes, or the classes aimed at when `targeted`.
            normalization: From pixels to the model's input; None for a model that takes pixels.

        Raises:
            InputError: Pixels outside [0, 1] or not the model's, labels that are no classes of it,
                or several epsilons (`evaluate` takes them).
        """
        if len(self.epsilons) != 1:
            raise expected("one epsilon", self.epsilons, "Use evaluate for a list.")
        images = _checked(images, labels, model, normalization)
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

        Raises:
            InputError: As in `perturb`, but for several epsilons.
        """
        images = _checked(images, labels, model, normalization)
        clean = _scores(model, images, normalization)
        classes = clean.shape[-1]
        labels = data.check_labels(labels, classes).to(images.device)
        aims = _wrong_classes(labels, classes, generator) if self.targeted else labels
        sign = self._direction(model, images, aims, normalization)
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
                image=images[i].float().cpu(),
                adversarial=shown[i].float().cpu(),
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
        signs = []
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            source = _deployed(model if self.surrogate is None else self.surrogate)
            like = next(source.parameters(), images)
            stack.enter_context(_evaluating(source))
            for pixels, aims in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
                leaf = pixels.to(like).detach().clone().requires_grad_()
                scores = _logits(source, leaf, normalization)
                aims = data.check_labels(aims, scores.shape[-1]).to(scores.device).clone()
                # A sum: the sign does not depend on how the batch is cut.
                loss = F.cross_entropy(scores, aims, reduction="sum")
                slope = torch.autograd.grad(loss, leaf)[0]
                if not bool(slope.isfinite().all()):
                    raise expected("a finite gradient", "NaN or infinity")
                signs.append(slope.sign().to(images))
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
        surrogate: A model with as many classes, of the dtype and on the device of `images`.
        images: The adversary's own pixels in [0, 1]; none of the victim's data is needed.
        normalization: From pixels to the surrogate's input; None for a model that takes pixels.
        learning_rate: Of AdamW, cosine decay to 0.
        generator: Order and flips.

    Returns:
        The surrogate in eval mode.
    """
    _check_pixels(images, surrogate, normalization)
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
            scores = _logits(surrogate, pixels, normalization)
            optimizer.zero_grad()
            F.cross_entropy(scores, answers[chosen.to(answers.device)]).backward()
            optimizer.step()
            schedule.step()
    return surrogate.eval()


def _deployed(model: nn.Module) -> nn.Module:
    """Return a protected model's copy, for a gradient that no hook takes for one of training.

    A shuffle, say, refuses to send anything after a gradient that was taken in eval mode. A model
    without a defense is used as it is: not every model can be copied.
    """
    # the bare model: a copy of a compiled one would compile anew
    bare = dict(model.named_children()).get("_orig_mod", model)
    if not any(name.rpartition(".")[2] == "vitguard" for name, _ in bare.named_modules()):
        return model
    try:
        model = copy.deepcopy(bare)
    except (RuntimeError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise expected("a model that can be copied", f"{type(model).__name__} ({first})") from error
    return model.requires_grad_(False).eval()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Use a model, which may be a black box without a copy, in eval mode; put back afterwards."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            if module.training != training:
                module.train(training)  # of its own: it may have more to put back than the flag


def _logits(model: nn.Module, pixels: Pixels, normalization: Normalization | None) -> Tensor:
    inputs = pixels if normalization is None else normalization.apply(pixels)
    scores = logits_of(model(inputs))
    return scores.float() if scores.element_size() < 4 else scores


def _scores(model: nn.Module, images: Pixels, normalization: Normalization | None) -> Tensor:
    with torch.no_grad(), _evaluating(model):
        parts = [_logits(model, part, normalization) for part in images.split(_CHUNK)]
    return torch.cat(parts).softmax(-1)


def _wrong_classes(labels: Tensor, classes: int, generator: torch.Generator | None) -> Tensor:
    if classes < 2:
        raise expected("a model with two classes or more", classes)
    shift = torch.randint(1, classes, labels.shape, generator=generator).to(labels.device)
    return (labels + shift) % classes


def _checked(
    images: Tensor, labels: Tensor, model: nn.Module, normalization: Normalization | None
) -> Tensor:
    _check_pixels(images, model, normalization)
    if labels.shape != images.shape[:1]:
        raise expected(f"{len(images)} labels", f"shape {tuple(labels.shape)}")
    return images.detach()


def _check_pixels(images: Tensor, model: nn.Module, normalization: Normalization | None) -> None:
    if images.dim() != 4 or not images.is_floating_point() or not len(images):
        raise expected(
            "floating pixels of shape (batch, channels, height, width)",
            f"{images.dtype} of shape {tuple(images.shape)}",
        )
    if normalization is not None and len(normalization.mean) not in (1, images.shape[1]):
        raise expected(f"{len(normalization.mean)} channels of pixels", images.shape[1])
    like = next((p for p in model.parameters() if p.is_floating_point()), images)
    if images.dtype != like.dtype or images.device != like.device:
        raise expected(
            f"pixels like the model's weights, {like.dtype} on {like.device}",
            f"{images.dtype} on {images.device}",
            "Move them: images.to(next(model.parameters())).",
        )
    low, high = (float(value) for value in images.detach().aminmax())
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
