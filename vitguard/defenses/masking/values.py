"""Tensors to integers modulo 2^32 within their bounds, and sums of them back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitguard.defenses.encryption.manifest import Outliers
from vitguard.defenses.encryption.packing import quantise
from vitguard.defenses.masking.terms import Terms
from vitguard.draws import Draws
from vitguard.errors import Rejected

__all__ = ["average", "integers"]

_PIECE = 1 << 17


def integers(
    tensors: Mapping[str, Tensor],
    terms: Terms,
    weight: float,
    *,
    outliers: Outliers,
    draws: Draws,
) -> tuple[NDArray[np.uint32], dict[str, int]]:
    """Return the weighted, stochastically rounded values, and how many were clipped by name.

    Raises:
        Rejected: The tensors are not those of the manifest.
        InputError: A value is not finite or beyond its bound, and `outliers` is `refuse`.
    """
    terms.manifest.check(tensors)
    total = np.empty(terms.manifest.values, np.uint32)
    clipped: dict[str, int] = {}
    share, at = weight / terms.manifest.max_weight, 0
    for entry in terms.manifest.entries:
        flat = tensors[entry.name].detach().cpu().reshape(-1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        for start in range(0, entry.size, _PIECE):
            values, count = entry.within(flat[start : start + _PIECE].numpy(), outliers)
            if count:
                clipped[entry.name] = clipped.get(entry.name, 0) + count
            factor = share * terms.levels / entry.bound
            whole = quantise(values, factor, terms.levels, _uniform(draws, len(values)))
            total[at : at + len(whole)].view(np.int32)[:] = whole  # within +-2^31
            at += len(whole)
    return total, clipped


def _uniform(draws: Draws, count: int) -> NDArray[np.float64]:
    """Return draws from [0, 1) in steps of 2^-32, which moves an expectation by 2^-33 levels."""
    words = draws.words((count + 1) // 2).view(np.uint32)[:count]
    return np.multiply(words, 2.0**-32, dtype=np.float64)


def average(
    total: NDArray[np.uint32], terms: Terms, weight: float, clients: int
) -> dict[str, Tensor]:
    """Return the weighted average by name, float32 (float64 where the tensors were).

    Raises:
        Rejected: A value is beyond what clients within their bounds can add up to.
    """
    signed, manifest = total.view(np.int32), terms.manifest
    share = weight / manifest.max_weight
    largest = min(terms.levels * clients, int(share * terms.levels * (1 + 1e-12)) + clients)
    if len(signed) and (int(signed.max()) > largest or int(signed.min()) < -largest):
        raise Rejected("range", "a sum with values beyond the bounds of the manifest")
    tensors, at = {}, 0
    for entry in manifest.entries:
        unit = entry.bound / (share * terms.levels)
        values = signed[at : at + entry.size] * unit
        kind = np.float64 if entry.double else np.float32
        tensors[entry.name] = torch.from_numpy(values.astype(kind)).reshape(entry.shape)
        at += entry.size
    return tensors
