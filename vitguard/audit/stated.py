"""What a report states of the model and of the adversary."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vitguard.errors import expected
from vitguard.report.finding import ModelFacts
from vitguard.threats.curious_server import CuriousServer, Threat
from vitguard.vit import Anatomy

__all__ = ["adversary_of", "facts_of"]


def adversary_of(threat: Threat | None, withhold: Sequence[str]) -> Threat:
    """Return the threat that was given, or a curious server to which `withhold` is not sent.

    Raises:
        InputError: Both were given.
    """
    if threat is not None and withhold:
        raise expected("a threat or withhold", "both", "CuriousServer(withhold=...) says both.")
    return threat or CuriousServer(tuple(withhold))


def facts_of(model: nn.Module, anatomy: Anatomy, name: str | None) -> ModelFacts:
    """Return what a report says of a model."""
    count = sum(p.numel() for p in model.parameters())
    return ModelFacts(name or type(model).__name__, count, anatomy.patches, anatomy.width)
