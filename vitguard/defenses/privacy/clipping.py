"""By how much each example's gradient is shortened, so that none counts for more than the clip.

References: flat, Abadi et al. (arXiv:1607.00133); per layer, McMahan et al. (arXiv:1710.06963);
automatic, AUTO-S of Bu et al. (arXiv:2206.07136).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from vitguard.errors import expected

__all__ = ["Clipping", "check_clipping", "clipping_factors", "joint_norm"]

Clipping = Literal["flat", "automatic", "per_layer"]
_GAMMA = 0.01
"""Of AUTO-S: it leaves an example with a tiny gradient tiny."""


def clipping_factors(
    norms: Mapping[str, Tensor], clip: float, clipping: Clipping, trained: Iterable[str]
) -> dict[str, Tensor]:
    """Return the factor of each example's gradient, (batch,) for each parameter of `norms`.

    The gradients times their factors have a 2-norm of at most `clip` over all parameters.

    Args:
        norms: 2-norms of each example's gradient by parameter name, (batch,) each.
        clip: Bound C, above 0.
        clipping: `flat`: C / max(norm, C), one factor for all parameters. `automatic`:
            C / (norm + 0.01), which brings all to nearly C. `per_layer`: each of the L layers of
            `trained` is clipped by itself, to C / sqrt(L).
        trained: Names of all trainable parameters. Their layers share the clip whether an example
            meets them or not: a bound that hung on the batch would depend on the records in it.
    """
    if clipping == "per_layer":
        layers = {_layer(name) for name in (*trained, *norms)}
        bound = clip / math.sqrt(len(layers))
        within: dict[str, list[Tensor]] = {}
        for name, norm in norms.items():
            within.setdefault(_layer(name), []).append(norm)
        found = {k: bound / joint_norm(v).clamp(min=bound) for k, v in within.items()}
        return {name: found[_layer(name)] for name in norms}
    norm = joint_norm(norms.values())
    factor = clip / (norm + _GAMMA if clipping == "automatic" else norm.clamp(min=clip))
    return dict.fromkeys(norms, factor)


def check_clipping(clipping: str) -> None:
    """Raise InputError for a word that is no kind of clipping."""
    if clipping not in get_args(Clipping):
        raise expected("clipping flat, automatic or per_layer", repr(clipping)[:80])


def joint_norm(norms: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of what has these norms, part by part."""
    return torch.stack([n.square() for n in norms]).sum(0).sqrt()


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
