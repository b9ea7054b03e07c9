"""The linear classification head of a model."""

from __future__ import annotations

import torch

from vitguard.core import View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = ["linear_head"]


def linear_head(view: View) -> str:
    """Return the module name of the linear classification head, or raise NotApplicable."""
    anatomy = Anatomy.of(view.model)
    modules = dict(view.model.named_modules())
    if len(anatomy.head) != 1:
        raise NotApplicable(f"needs one classification head, got {len(anatomy.head)}")
    inside = [
        n for n, m in modules.items() if n == anatomy.head[0] or n.startswith(f"{anatomy.head[0]}.")
    ]
    linear = [n for n in inside if isinstance(modules[n], torch.nn.Linear)]
    if not linear:
        raise NotApplicable("the classification head is not linear")
    return linear[-1]
