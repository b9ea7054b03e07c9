"""The model as NVFlare's job configuration names it: a class path and plain arguments."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from vitguard.errors import expected

__all__ = ["build_model"]


def build_model(config: Mapping[str, Any] | nn.Module) -> nn.Module:
    """Build the model that `{"path": "package.Class", "args": {...}}` names.

    NVFlare builds it before it makes a component; it is then taken as it is.

    Raises:
        InputError: It cannot be found, or is no module of torch.
    """
    if isinstance(config, nn.Module):
        return config
    path = config.get("path") or config.get("class_path") or ""
    module, _, name = str(path).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise expected(
            "a model as {'path': 'package.Class', 'args': {...}}", repr(path),
            "Its module must be importable where the job runs.",
        ) from error  # fmt: skip
    try:
        model = kind(**(config.get("args") or {}))
    except TypeError as error:
        raise expected(f"arguments that {path} takes", str(error)) from error
    if not isinstance(model, nn.Module):
        raise expected("a torch module", type(model).__name__)
    return model
