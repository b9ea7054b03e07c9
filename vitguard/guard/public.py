"""What the public knows of a protected model."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from vitguard.defenses.protection import Protection

__all__ = ["extras_of", "public_copy"]


def public_copy(model: nn.Module) -> nn.Module:
    """Return a clean copy of what the public knows: no hooks, secrets or local values."""
    clean = copy.deepcopy(model)
    protection: Protection = clean.get_submodule("vitguard")  # type: ignore[assignment]
    for piece in reversed(protection.installed()):
        piece.publish(clean)
    protection.unwatch()
    del clean.vitguard
    return clean


def extras_of(protection: Protection) -> dict[str, Tensor]:
    """Return what the defenses added to the model (an unknown token, a head), by name."""
    state = protection.state_dict(prefix="vitguard.")
    return {k: v.detach().clone() for k, v in state.items() if isinstance(v, Tensor)}
