"""Labels of a batch from the gradient of the classification head."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.core import View
from vitguard.errors import Blocked, NotApplicable
from vitguard.vit import Anatomy, logits_of

__all__ = ["infer_labels", "labels_from_counts", "linear_head", "try_labels"]

_SLACK = 0.1
"""Share of the bias gradient that may be left over where it should sum to 0: noise, rounding."""
_SECOND = 0.25
"""Share of the most negative entry at which a second one is a label too, and no longer noise."""


def infer_labels(view: View, generator: torch.Generator) -> Int[Tensor, " batch"]:
    """Return the labels behind a gradient of the mean hard-label cross-entropy, in ascending order.

    The gradient of the head's bias is g_c = mean_b p_bc - n_c / B. At B=1 the label is the only
    class with g_c < 0. Without a bias it is the row of the weight gradient that points against the
    sum of all others. For B > 1 the mean prediction is estimated on noise images with natural
    spectra and n_c = B (p_c - g_c) is rounded to counts that sum to B: exact while the estimate is
    right to 1 / (2 B), otherwise a guess.

    Raises:
        NotApplicable: No linear head, or its gradient is no hard-label cross-entropy gradient.
        Blocked: Neither bias nor weight of the head can be read.

    References:
        arXiv 2001.02610 (iDLG), docs/methods.md 2.5.
    """
    view = view.gradient()
    head = linear_head(view)
    batch = view.update.batch_size
    if view.update.can_read(f"{head}.bias"):
        gradient = view.read(f"{head}.bias")
        _require_finite(gradient)
        if batch == 1:
            return _only_negative(gradient)
        if not bool(gradient.sum().abs() <= _SLACK * gradient.abs().sum().clamp_min(1e-12)):
            raise NotApplicable("the head's bias gradient does not sum to 0: no cross-entropy")
        mean = _mean_prediction(view, generator)
        return labels_from_counts(batch * (mean - gradient), batch)
    weight = view.read(f"{head}.weight")
    _require_finite(weight)
    if batch == 1:
        # dL/dW_c = g_c f: one row points against all others, and it is the longest of them.
        total = weight @ weight.sum(0) - weight.square().sum(1)
        return total.argmin()[None]
    raise NotApplicable("labels of a batch need the gradient of the head's bias")


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


def labels_from_counts(counts: Float[Tensor, " classes"], batch: int) -> Int[Tensor, " batch"]:
    """Round counts to integers that sum to `batch` (largest remainders) and list the labels."""
    counts = counts.clamp(min=0)
    whole = counts.floor().clamp(max=batch)
    while whole.sum() > batch:
        whole[(counts - whole).masked_fill(whole == 0, torch.inf).argmin()] -= 1
    missing = int(batch - whole.sum())
    for _ in range(missing):
        whole[(counts - whole).argmax()] += 1
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), whole.long())


def linear_head(view: View) -> str:
    """Return the module name of the linear classification head, or raise NotApplicable."""
    anatomy = Anatomy.of(view.model)
    modules = dict(view.model.named_modules())
    if len(anatomy.head) != 1:
        raise NotApplicable(f"needs one classification head, got {len(anatomy.head)}")
    inside = [
        n for n, m in modules.items() if n == anatomy.head[0] or n.startswith(f"{anatomy.head[0]}.")
    ]
    linear = [n for n in inside if isinstance(modules[n], torch.nn.Linear)]
    if not linear:
        raise NotApplicable("the classification head is not linear")
    return linear[-1]


def _mean_prediction(view: View, generator: torch.Generator, count: int = 64) -> Tensor:
    """Mean softmax output on images with the 1 / frequency spectrum of natural photos."""
    channels, height, width = view.image_shape
    shape = (count, channels, height, width)
    noise = torch.randn(shape, generator=generator)
    down = torch.fft.fftfreq(height)[:, None]
    across = torch.fft.rfftfreq(width)[None]
    frequency = (down.square() + across.square()).sqrt().clamp_min(1 / max(height, width))
    images = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(height, width))
    images = 0.25 * images / images.std(dim=(1, 2, 3), keepdim=True) + 0.5
    parameter = next(view.model.parameters())
    inputs = view.normalization.apply(images.clamp(0, 1)).to(parameter)
    with torch.no_grad():
        chunks = [logits_of(view.model(c)).softmax(-1).double() for c in inputs.split(16)]
    return torch.cat(chunks).mean(0)
