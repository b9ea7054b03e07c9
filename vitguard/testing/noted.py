"""What the assertions of one test found, for the plugin's summary; imports nothing heavy."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["BUDGET", "FOLDER", "budget", "drain", "noted", "pictures_folder"]

BUDGET = "VITGUARD_BUDGET"
"""Environment variable: `fast` (the default) or `full`."""
FOLDER = "VITGUARD_PICTURES"
"""Environment variable: the folder that pictures of failures are saved in."""
_NOTES: list[dict[str, str]] = []

Function = TypeVar("Function", bound=Callable[..., Any])


def budget() -> str:
    """Return `fast` or `full`: how much work an assertion may do that was not told."""
    return "full" if os.environ.get(BUDGET) == "full" else "fast"


def pictures_folder() -> Path:
    """Return the folder that pictures of failures are saved in."""
    return Path(os.environ.get(FOLDER) or "vitguard-failures")


def drain() -> list[dict[str, str]]:
    """Return what was noted since the last call."""
    notes = list(_NOTES)
    _NOTES.clear()
    return notes


def noted(function: Function) -> Function:
    """Note the name and the outcome of each call of an assertion."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        outcome, message = "holds", ""
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            known = {"AssertionError": "fails", "Inconclusive": "inconclusive"}
            outcome, message = known.get(type(error).__name__, "error"), str(error)
            raise
        finally:
            _NOTES.append({"property": function.__name__, "outcome": outcome, "message": message})

    return wrapper  # type: ignore[return-value]
