"""Take one known image out of a batch's gradient (docs/methods.md 2.4b, step 6)."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import charge, charge_update
from vitguard.core import Update, View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = ["peel"]


def peel(
    view: View, image: Float[Tensor, "channels height width"], labels: Tensor | None = None
) -> tuple[View, int, float]:
    """Return the view of the batch without `image` (model input), its label, and the rank drop.

    B g = sum_b g_b, so the rest is (B g - g_image) / (B - 1). The label is the one whose
    subtraction lowers the rank of the head's gradient: with the right one singular value B falls
    by orders of magnitude against the first, and the third value returned is that ratio.

    Raises:
        NotApplicable: A batch of one, or no head gradient to choose the label by.
    """
    batch = view.update.batch_size
    if batch < 2:
        raise NotApplicable("a batch of one image has nothing to peel")
    anatomy = Anatomy.of(view.model)
    head = next((n for n in view.update.tensors if anatomy.role(n) == "head" and
                 view.update.tensors[n].dim() == 2), None)  # fmt: skip
    if head is None:
        raise NotApplicable("needs the head's weight gradient to choose the label")
    parameter = next(view.model.parameters())
    inputs = image[None].to(parameter)
    best: tuple[float, int, Update] | None = None
    for label in _candidates(view, labels, 2 * batch):
        charge_update(view, images=1)
        one = view.simulate(inputs, torch.tensor([label], device=inputs.device), None)
        rest = batch * view.read(head) - one.tensors[head].detach().double()
        charge(svd=0.4 * rest.numel() * min(rest.shape))
        values = torch.linalg.svdvals(rest)
        ratio = float(values[batch - 1] / values[0]) if len(values) >= batch else 0.0
        if best is None or ratio < best[0]:
            best = (ratio, label, one)
        if ratio < 1e-3:
            break
    assert best is not None
    ratio, label, one = best
    tensors = {
        name: (batch * view.read(name) - one.tensors[name].detach().double()) / (batch - 1)
        for name in view.update.tensors
        if name in one.tensors
    }
    update = replace(view.update, tensors=tensors, batch_size=batch - 1)
    return replace(view, update=update), label, ratio


def _candidates(view: View, labels: Tensor | None, count: int) -> list[int]:
    """Labels to try: those given, else the classes whose bias gradient is most negative."""
    if labels is not None and len(labels):
        return sorted(set(labels.tolist()))
    anatomy = Anatomy.of(view.model)
    bias = next((n for n in view.update.tensors if anatomy.role(n) == "head" and
                 view.update.tensors[n].dim() == 1), None)  # fmt: skip
    if bias is None:
        return list(range(min(view.classes, 1000)))
    return view.read(bias).argsort()[:count].tolist()
