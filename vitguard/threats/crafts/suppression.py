"""Weights that give no gradient, for all clients but the one that the server is after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitguard.attacks.equations.head import linear_heads
from vitguard.errors import NotApplicable
from vitguard.threats.crafts.base import Craft
from vitguard.vit import Anatomy

__all__ = ["Suppression"]


@dataclass(frozen=True)
class Suppression(Craft):
    """The head's weights and the norm before it are zero: no gradient but that of the head's bias.

    A server that sends these to all clients but one, and honest or crafted weights to that one,
    finds its update alone in a sum, whoever adds it up and however it is encrypted. What the head's
    bias tells are the labels of all.

    References:
        Eluding Secure Aggregation, arXiv 2111.07380 (gradient suppression).
    """

    name: ClassVar[str] = "suppression"

    def weights(
        self, model: nn.Module, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the crafted state dict; see `Craft.weights`."""
        anatomy = Anatomy.of(model)
        state = {name: t.detach().clone() for name, t in model.state_dict().items()}
        inside = tuple(f"{b.name}." for b in anatomy.blocks)
        last = [n for n in state if anatomy.role(n) == "norm" and not n.startswith(inside)]
        if not anatomy.classes or not last:
            raise NotApplicable("no norm and head behind the blocks")
        for name in last:
            state[name].zero_()
        for head in linear_heads(model, anatomy):
            state[f"{head}.weight"].zero_()
        return state
