"""Selectors: parameters named by their role or by a regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vitguard.errors import expected

__all__ = ["SELECTORS", "alternatives", "matching"]

SELECTORS = ("attention", "mlp", "patch", "position", "token", "norm", "head", "embedding", "all")


def matching(
    pattern: str, names: Sequence[str], words: Sequence[str] = SELECTORS, join: str = ""
) -> list[str]:
    """Return those of `names` in which a regular expression is found.

    Args:
        words: What means something by itself and is therefore no alternative of a pattern.
        join: What the caller offers for several words at once, to end the error with.

    Raises:
        InputError: No expression, one that matches no name, or one with a word among its
            alternatives, which would be read as a pattern.
    """
    what = f"one of {', '.join(words)} or a regular expression that matches a parameter"
    do = f"Names look like {', '.join(names[:3])}."
    if not pattern:
        raise expected(what, "an empty part", do)
    for one in alternatives(pattern):
        if one in words:
            raise expected(
                "a role alone or a regular expression",
                f"{pattern!r}, in which the role {one!r} would be read as a pattern",
                join or "Give each by itself.",
            )
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise expected(what, f"{pattern!r} ({error})", do) from error
    chosen = [n for n in names if compiled.search(n)]
    if not chosen:
        raise expected(what, repr(pattern), do)
    return chosen


def alternatives(pattern: str) -> list[str]:
    """Split a regular expression at those `|` that are in no group, no set and not escaped."""
    found, depth, inside = [""], 0, False
    for piece in re.findall(r"\\.|.", pattern, re.DOTALL):
        if piece == "|" and not depth and not inside:
            found.append("")
            continue
        if inside:
            inside = piece != "]"
        elif piece == "[":
            inside = True
        else:
            depth += (piece == "(") - (piece == ")")
        found[-1] += piece
    return found
