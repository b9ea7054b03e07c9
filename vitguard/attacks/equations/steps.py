"""Local steps: a difference is a sum of gradients, and each step has tokens of its own.

W_0 - W_E = rate * sum_k G_k, and G_k = sum_t d_t a_t^T over the tokens of step k. So the rows of
the sum span the inputs of every step: E times as many directions as one gradient, of which those of
the first step belong to the public weights and fulfil its equations to rounding. An image over E
steps is to the equations what a batch of E is, of which one image is wanted. Weights move little in
a step, so many of these directions are weak; those that rounding hides do not count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.core import View

__all__ = ["directions"]

_CLEAR = 1.5  # times the rounding: a direction that stands out of it


def directions(view: View, names: tuple[str, ...], tokens: int, most: int) -> int:
    """Return how many directions the rows of tensors span: `tokens`, with local steps up to `most`.

    Args:
        view: Of a gradient, or of the sum of those of several steps.
        names: Weights of linear layers; the largest count is returned.
        tokens: Of one step.
    """
    if view.update.local_steps == 1:
        return tokens
    return max(min(_seen(view, name), most) for name in names) if names else tokens


def _seen(view: View, name: str) -> int:
    matrix = view.read(name).flatten(1)
    charge(svd=matrix.numel() * min(matrix.shape))
    values = torch.linalg.svdvals(matrix)
    floor = _rounding(view, name, matrix) * sum(n**0.5 for n in matrix.shape)
    return int((values > _CLEAR * floor).sum())


def _rounding(view: View, name: str, matrix: Tensor) -> float:
    """Standard deviation of an entry's rounding: of the weights after each step, and its own."""
    dtype = view.update.tensors[name].dtype
    unit = torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps
    size = view.weight(name).flatten(1).square().mean().sqrt()
    rate, steps = view.update.learning_rate or 1.0, view.update.local_steps
    own = unit * matrix.square().mean().sqrt()
    return float(0.3 * (unit * size / rate) * steps**0.5 + own)
