"""The signs, their limits and what they mean.

The limits stand well above what one half of the honest models of `benchmarks/inspection.py` shows,
which judges them on the other half: other draws, other images, other runs. Two signs have none:
honest models that fit their data have them as large as crafted ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from vitguard.inspection.verdict import Sign

__all__ = ["SIGNS", "largest"]

SIGNS: dict[str, tuple[float, str]] = {
    "not finite": (0.5, "values that are no numbers"),
    "parallel rows": (0.05, "share of rows of a gated layer that are parallel to another one"),
    "ordered biases": (5.0, "how much more evenly biases follow each other than by chance"),
    "muted branch": (30.0, "how many times a branch of a block makes a unit input shorter"),
    "shut units": (0.2, "share of hidden units that hardly any input sets off"),
    "scaled row": (15.0, "length of the longest row of a layer over the usual one"),
    "head bias": (10.0, "largest distance of a class's bias from the usual one"),
    "scaled norm": (50.0, "largest scale of a norm over the usual one"),
    "muted norm": (30.0, "how many times the scales of a norm are smaller than one"),
    "steep units": (0.5, "share of hidden values at which the activation is a step"),
    "silent units": (0.5, "share of hidden units that no token of the batch sets off"),
    "logit spread": (60.0, "largest distance between the scores of one image's classes"),
    "lone sample": (math.inf, "gradient of one image over that of all others (D-SNR)"),
    "lone token": (math.inf, "largest share of one patch in a row of the gradient"),
    "lone tokens": (0.5, "share of rows of the gradient that one patch makes more than half of"),
    "lone token in pairs": (0.06, "the same for differences of two rows, as bins are read"),
    "moved": (1.25, "relative change of a matrix since the last accepted weights"),
    "jumped": (10.0, "that change over the largest one of earlier rounds"),
}
"""Name of each sign: its limit, and what its number is."""


def largest(name: str, values: Iterable[tuple[str, float]]) -> list[Sign]:
    """Return the sign at the place with the largest value; nothing where there is no place."""
    # what is no number stands first: it compares with nothing, and would hide what is large
    found = sorted(values, key=lambda item: -math.inf if math.isnan(item[1]) else -item[1])
    limit, meaning = SIGNS[name]
    return [Sign(name, *found[0], limit, meaning)] if found else []
