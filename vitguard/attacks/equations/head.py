"""The linear classification head of a model."""

from __future__ import annotations

from torch import nn

from vitguard.core import View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = ["linear_head", "linear_heads"]


def linear_head(view: View) -> str:
    """Return the module name of the linear classification head, or raise NotApplicable."""
    anatomy = Anatomy.of(view.model)
    if len(anatomy.head) != 1:
        raise NotApplicable(f"needs one classification head, got {len(anatomy.head)}")
    return linear_heads(view.model, anatomy)[0]


def linear_heads(model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    """Return the module names of the last linear layers of all heads, or raise NotApplicable."""
    modules, found = dict(model.named_modules()), []
    for head in anatomy.head:
        inside = [n for n in modules if n == head or n.startswith(f"{head}.")]
        linear = [n for n in inside if isinstance(modules[n], nn.Linear)]
        if not linear:
            raise NotApplicable("the classification head is not linear")
        found.append(linear[-1])
    return tuple(found)
