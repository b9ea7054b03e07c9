"""Labels of a batch from the gradient of the classification head."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.attacks.budget import charge_update
from vitguard.attacks.cascade.attack import Samples, last_block_samples
from vitguard.attacks.equations.head import linear_head
from vitguard.attacks.spectrum import filtered, frequencies
from vitguard.core import View
from vitguard.errors import Blocked, NotApplicable
from vitguard.vit import logits_of

__all__ = ["infer_labels", "labels_from_counts", "pair_labels", "try_labels"]

_SLACK = 0.1
"""Share of the bias gradient that may be left over where it should sum to 0: noise, rounding."""
_ALIKE = 0.1
"""Share of its possible spread below which a model says the same of every image."""
_SECOND = 0.25
"""Share of the most negative entry at which a second one is a label too, and no longer noise."""


def infer_labels(view: View, generator: torch.Generator) -> Int[Tensor, " batch"]:
    """Return the labels behind a gradient of the mean hard-label cross-entropy, in ascending order.

    The gradient of the head's bias is g_c = mean_b p_bc - n_c / B. At B=1 the label is the only
    class with g_c < 0. Without a bias it is the row of the weight gradient that points against the
    sum of all others. For B > 1 with class-token pooling the cascade separates the batch in the
    last block, which gives the label of each image it finds, and mostly it finds all. For the rest
    n_c = B (p_c - g_c) is rounded to counts that sum to what is missing, with p_c from noise images
    of natural spectra where the model says the same of all of them (it is hardly trained), else
    from the images found, else equal for all classes: exact while p_c is right to 1 / (2 B),
    otherwise a guess.

    Raises:
        NotApplicable: No linear head, its gradient is no hard-label cross-entropy gradient, or an
            incomplete batch and no gradient of the head's bias.
        Blocked: Neither bias nor weight of the head can be read.

    References:
        arXiv 2001.02610 (iDLG), docs/methods.md 2.5.
    """
    view = view.gradient()
    head = linear_head(view)
    batch = view.update.batch_size
    samples = _separated(view, generator) if batch > 1 else None
    if samples is not None and len(samples.labels) == batch:
        return samples.labels.sort().values
    if view.update.can_read(f"{head}.bias"):
        gradient = view.read(f"{head}.bias")
        _require_finite(gradient)
        if batch == 1:
            return _only_negative(gradient)
        if not bool(gradient.sum().abs() <= _SLACK * gradient.abs().sum().clamp_min(1e-12)):
            raise NotApplicable("the head's bias gradient does not sum to 0: no cross-entropy")
        return _completed(view, gradient, samples, generator)
    weight = view.read(f"{head}.weight")
    _require_finite(weight)
    if batch == 1:
        # dL/dW_c = g_c f: one row points against all others, and it is the longest of them.
        total = weight @ weight.sum(0) - weight.square().sum(1)
        return total.argmin()[None]
    raise NotApplicable("labels of a batch need the gradient of the head's bias")


def _separated(view: View, generator: torch.Generator) -> Samples | None:
    """Return the images that the cascade finds with a label, None where it does not apply.

    Raises:
        NotApplicable: It finds images that no single class explains.
    """
    try:
        samples = last_block_samples(view, generator)
    except (Blocked, NotApplicable):
        return None
    told = samples.labels >= 0
    found, batch = len(told), view.update.batch_size
    if not found:
        return None
    if not bool(told.all()) and (found == batch or int(told.sum()) * 2 < found):
        raise NotApplicable("no single class explains an image's gradient: a soft label")
    return samples.where(told)


def _completed(
    view: View, gradient: Tensor, samples: Samples | None, generator: torch.Generator
) -> Tensor:
    """Return the labels of `samples` and, from the bias gradient, guesses of the missing ones."""
    batch = view.update.batch_size
    mean = _mean_prediction(view, generator)
    if samples is None or samples.reading is None:
        mean = mean if mean is not None else gradient.new_full(gradient.shape, 1 / len(gradient))
        return labels_from_counts(batch * (mean - gradient), batch)
    predicted, labels = samples.reading.predicted, samples.labels
    mean = mean if mean is not None else predicted.mean(0)
    wrong = predicted - torch.nn.functional.one_hot(labels, predicted.shape[1])
    share = samples.weights.median()
    left = gradient / share - wrong.sum(0)
    missing = batch - len(labels)
    rest = labels_from_counts(missing * mean - left, missing)
    return torch.cat([labels, rest.to(labels)]).sort().values


def _require_finite(gradient: Tensor) -> None:
    if not bool(gradient.isfinite().all()):
        raise NotApplicable("the gradient of the head is not finite")


def _only_negative(gradient: Float[Tensor, " classes"]) -> Int[Tensor, " one"]:
    """Return the one class that the gradient raises; two of them mean a soft label."""
    lowest = gradient.topk(min(2, len(gradient)), largest=False).values
    if not float(lowest[0]) < 0:
        raise NotApplicable("no class has a negative gradient: no hard-label cross-entropy")
    if len(lowest) > 1 and float(lowest[1]) < _SECOND * float(lowest[0]):
        raise NotApplicable("several classes have a negative gradient: a soft label")
    return gradient.argmin()[None]


def try_labels(view: View, generator: torch.Generator) -> Tensor | None:
    """Return `infer_labels`, or None where it cannot say."""
    try:
        return infer_labels(view, generator)
    except (Blocked, NotApplicable):
        return None


def pair_labels(
    view: View,
    images: Float[Tensor, "images channels height width"],
    labels: Int[Tensor, " labels"],
) -> Int[Tensor, " labels"]:
    """Return the labels in the order of the images, where the head's gradient tells it.

    Its rows are sum_b p_bc f_b - sum_{y_b = c} f_b over the batch: mostly the right pairs (b, c)
    make the sum of row_c f_b smallest. Where the head cannot be read or no order is better, the
    labels come back as they were.

    Args:
        images: Guessed pixels in [0, 1], as many as labels.
        labels: Class indices in any order.
    """
    from scipy.optimize import linear_sum_assignment

    if len(labels) != len(images) or len(images) < 2:
        return labels
    try:
        head = linear_head(view)
        rows = view.gradient(steps=True).read(f"{head}.weight")
    except (Blocked, NotApplicable):
        return labels
    features: list[Tensor] = []
    hook = view.model.get_submodule(head).register_forward_pre_hook(
        lambda _module, inputs: features.extend(x.double() for x in inputs[:1])
    )
    parameter = next(view.model.parameters())
    inputs = view.normalization.apply(images.to(parameter)).split(16)
    try:
        with torch.no_grad():
            for few in inputs:
                view.model(few)
    finally:
        hook.remove()
    charge_update(view, times=0.3, images=len(images))
    if len(features) != len(inputs) or any(f.shape[1:] != rows.shape[1:] for f in features):
        return labels
    cost = (torch.cat(features) @ rows.to(features[0])[labels.to(rows.device)].T).cpu()
    if not bool(cost.isfinite().all()):
        return labels
    order = torch.as_tensor(linear_sum_assignment(cost.numpy())[1])
    better = cost.gather(1, order[:, None]).sum() < cost.diagonal().sum()
    return labels[order.to(labels.device)] if bool(better) else labels


def labels_from_counts(counts: Float[Tensor, " classes"], batch: int) -> Int[Tensor, " labels"]:
    """Round counts to integers that sum to `batch` (largest remainders) and list the labels."""
    counts = counts.clamp(min=0)
    whole = counts.floor().clamp(max=batch)
    while whole.sum() > batch:
        whole[(counts - whole).masked_fill(whole == 0, torch.inf).argmin()] -= 1
    missing = int(batch - whole.sum())
    for _ in range(missing):
        whole[(counts - whole).argmax()] += 1
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), whole.long())


def _mean_prediction(view: View, generator: torch.Generator, count: int = 64) -> Tensor | None:
    """Mean softmax output on images with the 1 / frequency spectrum of natural photos.

    None where the outputs differ: a trained model's opinion on noise says nothing of photos.
    """
    noise = torch.randn((count, *view.image_shape), generator=generator)
    images = filtered(noise, 1 / frequencies(noise))
    images = 0.25 * images / images.std(dim=(1, 2, 3), keepdim=True) + 0.5
    parameter = next(view.model.parameters())
    inputs = view.normalization.apply(images.clamp(0, 1)).to(parameter)
    with torch.no_grad():
        chunks = [logits_of(view.model(c)).softmax(-1).double() for c in inputs.split(16)]
    charge_update(view, times=0.3, images=count)
    said = torch.cat(chunks)
    mean = said.mean(0)
    spread = (said - mean).square().sum(1).mean()
    return mean if bool(spread < _ALIKE * (1 - mean.square().sum())) else None
