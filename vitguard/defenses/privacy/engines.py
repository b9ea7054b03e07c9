"""The engines that clip each example's gradient, by name."""

from __future__ import annotations

from vitguard.defenses.privacy.engine import Engine
from vitguard.errors import missing_extra

__all__ = ["engine_of"]


def engine_of(name: str) -> Engine:
    """Return a new engine: `bookkeeping`, or `opacus`, the reference.

    Raises:
        MissingExtra: opacus is asked for and not installed.
    """
    if name == "bookkeeping":
        return Engine()
    try:
        from vitguard.defenses.privacy.opacus_engine import OpacusEngine
    except ImportError as error:
        raise missing_extra("engine='opacus'", "opacus") from error
    return OpacusEngine()
