"""Slow, obvious versions of published crafts: same names, shapes and types as the model's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitguard.vit import Anatomy


def _copy(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def imprint(model, *, block=0, steepness=50.0, noise=0.0, directions=1, mute=0.0, seed=0):
    """The hidden units of one MLP as bins along a direction (arXiv:2110.13057, 2303.12233).

    Args:
        steepness: Length of the rows of fc1.
        noise: Of each row, relative to its length.
        directions: Measuring directions that take turns.
        mute: What is left of the attention's projection.
    """
    generator = torch.Generator().manual_seed(seed)
    weights, parts = _copy(model), Anatomy.of(model).blocks[block]
    weights[f"{parts.proj}.weight"] *= mute
    weights[f"{parts.proj}.bias"] *= mute
    rows, bias = weights[f"{parts.fc1}.weight"], weights[f"{parts.fc1}.bias"]
    count, width = rows.shape
    chosen = torch.randn(directions, width, generator=generator)
    chosen = F.normalize(chosen - chosen.mean(1, keepdim=True), dim=1)
    bins = count // directions
    for k in range(count):
        quantile = torch.tensor((k // directions + 0.5) / max(bins, 1)).clamp(0.001, 0.999)
        threshold = torch.distributions.Normal(0.0, 1.0).icdf(quantile)
        row = chosen[k % directions]
        jitter = torch.randn(width, generator=generator) * noise / width**0.5
        rows[k] = steepness * F.normalize(row + jitter, dim=0)
        bias[k] = -steepness * threshold
    outputs = weights[f"{parts.fc2}.weight"]
    outputs[:] = 1e-3 * torch.randn(len(outputs), 1, generator=generator)
    return weights


def fishing(model, *, target=0, factor=1000.0):
    """One class alone has a gradient: the others are certain (arXiv:2202.00580)."""
    weights, head = _copy(model), Anatomy.of(model).head[0]
    weights[f"{head}.weight"] *= 0
    weights[f"{head}.weight"][target] = 0.5
    weights[f"{head}.bias"] += factor
    weights[f"{head}.bias"][target] -= factor
    return weights


def scaled_head(model, *, target=0, factor=100.0):
    """One row of the head dominates the average."""
    weights, head = _copy(model), Anatomy.of(model).head[0]
    weights[f"{head}.weight"][target] *= factor
    return weights


def suppression(model, *, level=-50.0):
    """Hidden units that nothing sets off, so that this client adds nothing (arXiv:2111.07380)."""
    weights = _copy(model)
    for parts in Anatomy.of(model).blocks:
        weights[f"{parts.fc1}.bias"][:] = level
    return weights


PUBLISHED = {
    "imprint": imprint,
    "imprint in a later block": lambda m: imprint(m, block=1),
    "fishing": fishing,
    "scaled head": scaled_head,
    "suppression": suppression,
}
