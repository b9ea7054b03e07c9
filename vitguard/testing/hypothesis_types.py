"""Tells Hypothesis of vitguard's types, so that `st.from_type(vg.Update)` works.

The entry point runs when Hypothesis is imported, in test suites that may never use vitguard: it
imports neither torch nor anything of vitguard, and registers the types of a module as soon as
somebody else has imported it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register"]

TYPES: Mapping[str, Sequence[str]] = {
    "vitguard.core": ("Batch", "LocalTraining", "Normalization", "Update"),
    "vitguard.defenses.base": (
        "BatchDefense", "Defense", "ModelDefense", "StepDefense", "UpdateDefense",
    ),
}  # fmt: skip


def register() -> None:
    """Register the types of modules that are imported, now or later; once a process."""
    for name in TYPES:
        if name in sys.modules:
            _register(sys.modules[name])
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register(module: ModuleType) -> None:
    from hypothesis import strategies as st

    for name in TYPES[module.__name__]:
        st.register_type_strategy(getattr(module, name), _strategy)


def _strategy(kind: type) -> Any:
    from vitguard.testing.strategies import for_type

    return for_type(kind)


class _Watch(MetaPathFinder):
    """Finds nothing itself: lets the others find a module, and is told once it has run."""

    def __init__(self) -> None:
        self.left = {name for name in TYPES if name not in sys.modules}

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in self.left:
            return None
        self.left.discard(name)  # first: the search below comes by here again
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if module.__name__ == name:  # pytest loads all that it rewrites by one loader
                    _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
