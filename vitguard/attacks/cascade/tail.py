"""What follows the last MLP for one class token, and which label explains a gradient behind it.

A class token h = s n + m leaves the last block, n its normed input of the MLP, m the MLP's output,
s the one unknown. The head sees norm(h), so that image's gradient by m is J(s) W^T (p(s) - y) up to
a factor: one number and one label. It must lie in the column space of dL/dW of fc2, which leaves
width - B equations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.attacks.equations.head import linear_head
from vitguard.attacks.equations.mlp import Norm
from vitguard.attacks.equations.probe import probe
from vitguard.core import View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = ["Reading", "Tail"]

_CHUNK = 16  # images read at once: 1,000 classes of them take 100 MB
_DECADES, _COARSE, _FINE, _ZOOMS = 3.0, 64, 17, 6
_KEPT = 8  # labels that are refined
_MISFIT, _LEAD = 5e-3, 0.5


@dataclass(frozen=True)
class Reading:
    """What one class token says.

    Args:
        labels: Best label, or -1 where none explains the gradient: a soft label, another loss.
        misfit: Relative misfit of the best label's direction to the column space.
        predicted: Softmax outputs, shape (batch, classes).
        features: The head's inputs, shape (batch, width).
        gradients: dL_b/d(fc2 output) of each image's own loss, shape (batch, width).
    """

    labels: Int[Tensor, " batch"]
    misfit: Float[Tensor, " batch"]
    predicted: Float[Tensor, "batch classes"]
    features: Float[Tensor, "batch width"]
    gradients: Float[Tensor, "batch width"]

    @staticmethod
    def joined(parts: list[Reading]) -> Reading:
        """Return the readings of several groups of images as one."""
        return Reading(*(torch.cat([getattr(part, name) for part in parts]) for name in _READ))

    def where(self, mask: Tensor) -> Reading:
        """Return the reading of some of the images."""
        return Reading(*(getattr(self, name)[mask] for name in _READ))


_READ = ("labels", "misfit", "predicted", "features", "gradients")


@dataclass(frozen=True)
class Tail:
    """Layer scale, final norm and linear head, in float64.

    Args:
        norm: Between the last block and the head.
        weight, bias: The head's, shapes (classes, width) and (classes,).
        scale: The last block's layer scale of its MLP, ones where it has none.
    """

    norm: Norm
    weight: Float[Tensor, "classes width"]
    bias: Float[Tensor, " classes"]
    scale: Float[Tensor, " width"]

    @staticmethod
    def of(view: View, anatomy: Anatomy) -> Tail:
        """Read the tail of the view's model.

        Raises:
            NotApplicable: No linear head, or no LayerNorm in front of it.
        """
        head, block = linear_head(view), anatomy.blocks[-1]
        weight = view.weight(f"{head}.weight")
        return Tail(
            norm=_final_norm(view, anatomy, head),
            weight=weight,
            bias=view.bias(head),
            scale=torch.ones_like(weight[0]) if block.scale2 is None else view.weight(block.scale2),
        )

    def read(
        self,
        normal: Float[Tensor, "batch width"],
        added: Float[Tensor, "batch width"],
        outside: Float[Tensor, "width rest"],
    ) -> Reading:
        """Find each image's label.

        Args:
            normal: The class tokens n without the MLP norm's scale and shift.
            added: The MLP's outputs m, layer scale included.
            outside: Orthonormal complement of the column space of fc2's weight gradient.
        """
        rows = self.weight * self.norm.scale
        rows = rows - rows.mean(1, keepdim=True)
        frames = outside * self.scale[:, None], self.scale.diag()
        views = [(rows, frame, rows @ frame) for frame in frames]
        pieces = zip(normal.split(_CHUNK), added.split(_CHUNK), strict=True)
        return Reading.joined([self._read(n, m, views) for n, m in pieces])

    def _read(self, normal: Tensor, added: Tensor, views: list[tuple[Tensor, ...]]) -> Reading:
        rows = torch.arange(len(normal), device=normal.device)
        classes: Tensor | None = None
        span = torch.linspace(-_DECADES / 2, _DECADES / 2, _COARSE).to(normal)
        size, width = added.std(1, keepdim=True), _DECADES / _COARSE
        for _ in range(_ZOOMS + 1):
            trial = size * 10**span
            asked = len(self.weight) if classes is None else classes.shape[1]
            each = len(normal) * len(span) * self.weight.shape[1]
            inner = 2.0 * each * (2 * len(self.weight) + 4 * asked + 4 * self.weight.shape[1])
            charge(products=inner, elements=0.3 * len(normal) * len(span) * asked * 8, calls=60)
            misfit = self._misfit(normal, added, trial, views, classes)
            best, where = misfit.min(1)
            chosen = best.argmin(1)
            size = trial[rows, where[rows, chosen]][:, None]
            keep = best.topk(min(_KEPT, best.shape[1]), largest=False).indices
            classes = keep if classes is None else classes.gather(1, keep)
            best = best.gather(1, keep)
            span = torch.linspace(-width, width, _FINE).to(normal)
            width = width / 4
        assert classes is not None
        lead = best[:, 0] < _LEAD * best[:, 1] if best.shape[1] > 1 else best[:, 0] < 1
        hard = (best[:, 0] < _MISFIT) & lead
        labels = torch.where(hard, classes[:, 0], -1)
        h = size * normal + added
        features = self.norm(h)
        predicted = (features @ self.weight.T + self.bias).softmax(-1)
        wrong = predicted - torch.nn.functional.one_hot(classes[:, 0], len(self.weight))
        gradients = self.scale * self.norm.pulled(h, wrong @ self.weight)
        return Reading(labels, best[:, 0], predicted, features, gradients)

    def _misfit(
        self,
        normal: Tensor,
        added: Tensor,
        size: Tensor,
        views: list[tuple[Tensor, ...]],
        classes: Tensor | None,
    ) -> Tensor:
        """Share of the gradient outside the column space, shape (batch, sizes, labels).

        With slope_y = C (u - w_y), u = p W, and J = C - f f^T / width the squares of all labels
        come from inner products; no gradient is built for a label of its own.
        """
        flat, _ = self.norm.plain(size[..., None] * normal[:, None] + added[:, None])
        logits = (flat * self.norm.scale + self.norm.shift) @ self.weight.T + self.bias
        mean = logits.softmax(-1) @ views[0][0]
        along = flat / flat.shape[-1]
        squares = []
        for rows, frame, framed in views:
            own = (mean - (mean * flat).sum(-1, keepdim=True) * along) @ frame
            line = along @ frame
            raw, picked = (rows, framed) if classes is None else (rows[classes], framed[classes])
            turn = flat @ raw.mT
            across = own @ picked.mT - turn * (own * line).sum(-1, keepdim=True)
            square = picked.square().sum(-1).unsqueeze(-2) - 2 * turn * (line @ picked.mT)
            square = square + turn.square() * line.square().sum(-1, keepdim=True)
            squares.append(own.square().sum(-1, keepdim=True) - 2 * across + square)
        return (squares[0].clamp_min(0) / squares[1].clamp_min(1e-300)).sqrt()


def _final_norm(view: View, anatomy: Anatomy, head: str) -> Norm:
    """Find the norm between the last block and the head by what it does to a test image."""
    entered, left = probe(view, entering=[head], leaving=[anatomy.blocks[-1].name])
    # DINOv2's head reads the class token beside the mean of the patches, which is no norm's output
    if left.dim() == 3 and left.shape[2] == anatomy.width and entered.shape == (1, anatomy.width):
        token = left[0, 0].double()
        for name, module in view.model.named_modules():
            if isinstance(module, torch.nn.LayerNorm) and module.normalized_shape == token.shape:
                norm = Norm.of(view, name)
                if torch.allclose(norm(token), entered[0].double(), atol=1e-4):
                    return norm
    raise NotApplicable("no LayerNorm between the last block's class token and the head")
