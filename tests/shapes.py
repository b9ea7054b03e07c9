"""Check every annotation of vitguard, the shapes of its tensors included, while the tests run.

`VITGUARD_SHAPES=1 python -m pytest` turns it on, with pytest-xdist as well. A call that contradicts
its annotation then raises `jaxtyping.TypeCheckError`.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import CodeType
from typing import Any

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception
from jaxtyping import config, install_import_hook

# As PEP 484 has it: where a float is wanted, an int will do.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Any) -> Any:
    """Return the function with its annotations checked; as it is where they say `Self`."""
    try:
        return _check(function)
    except BeartypeDecorHintPep673Exception:  # known inside a class only, and methods come alone
        return function


_ENOUGH = 3
"""So often a function inside another is checked: a check takes milliseconds to make, each time."""


def _sparing(typechecker: Any) -> Any:
    """In place of `jaxtyping.jaxtyped`, as its import hook calls it."""
    check = _jaxtyped(typechecker=typechecker)

    def decorate(made: Any) -> Any:
        if "<locals>" in made.__qualname__ and hasattr(made, "__code__"):
            _inside[made.__code__] += 1
            if _inside[made.__code__] > _ENOUGH:
                return made
        return check(made)

    return decorate


_jaxtyped = jaxtyping.jaxtyped
_inside: Counter[CodeType] = Counter()


class _Refused:
    """`pytest.raises` without the check: a test of what we say to wrong input must get there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.raises = _raises(*args, **kwargs)

    def __enter__(self) -> Any:
        self.before = config.jaxtyping_disable
        config.update("jaxtyping_disable", True)
        return self.raises.__enter__()

    def __exit__(self, *error: Any) -> Any:
        config.update("jaxtyping_disable", self.before)
        return self.raises.__exit__(*error)


_raises = pytest.raises

UNCHECKED = {"vitguard", "vitguard.testing"} | {
    f"vitguard.testing.{name}" for name in ("hypothesis_types", "noted", "plugin")
}
"""What pytest and Hypothesis load before any test. No annotation of a tensor stands there."""


def install() -> None:
    """Turn the check on.

    Raises:
        pytest.UsageError: A module of vitguard was imported before, and would not be checked.
    """
    early = {name for name in sys.modules if name.partition(".")[0] == "vitguard"} - UNCHECKED
    if early:
        raise pytest.UsageError(f"Imported before VITGUARD_SHAPES could check it: {sorted(early)}")
    jaxtyping.jaxtyped = _sparing  # type: ignore[assignment]
    install_import_hook("vitguard", "tests.shapes.checked")
    pytest.raises = _Refused  # type: ignore[assignment]
