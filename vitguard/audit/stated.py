"""What a report states of the model, the images and the adversary."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitguard.errors import expected
from vitguard.report.finding import ModelFacts
from vitguard.selectors import several
from vitguard.threats.curious_server import CuriousServer, Threat
from vitguard.vit import Anatomy

__all__ = ["adversary_of", "checked_seed", "facts_of", "given_tensor", "names_of"]


def adversary_of(threat: Threat | None, withhold: Sequence[str]) -> Threat:
    """Return the threat that was given, or a curious server to which `withhold` is not sent.

    Raises:
        InputError: Both were given.
    """
    if threat is not None and withhold:
        raise expected("a threat or withhold", "both", "CuriousServer(withhold=...) says both.")
    return threat or CuriousServer(several(withhold))


def facts_of(model: nn.Module, anatomy: Anatomy, name: str | None) -> ModelFacts:
    """Return what a report says of a model."""
    count = sum(p.numel() for p in model.parameters())
    return ModelFacts(name or type(model).__name__, count, anatomy.patches, anatomy.width)


def given_tensor(value: Any, what: str) -> Tensor | None:
    """Return a tensor of what was given, arrays and lists too; None where nothing was.

    Raises:
        InputError: It is nothing that `torch.as_tensor` takes.
    """
    try:
        return None if value is None else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise expected(f"{what} as a tensor or an array", type(value).__name__) from error


def names_of(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Return one name for each image.

    Raises:
        InputError: Names were given, and not so many.
    """
    given = (names,) if isinstance(names, str) else names  # a name alone is no list of letters
    told = tuple(given or (f"image {i}" for i in range(count)))
    if len(told) != count:
        raise expected(f"{count} names, one for each image", len(told))
    return told


def checked_seed(seed: int) -> int:
    """Return the seed of an audit.

    Raises:
        InputError: It is no whole number of at least 0.
    """
    try:
        whole = operator.index(seed)  # NumPy's whole numbers too
    except TypeError:
        whole = -1
    if not 0 <= whole < 2**63:
        raise expected("seed as a whole number of at least 0 and below 2**63", repr(seed))
    return whole
