"""Selections: which parameters are encrypted, and the smallest set that ends the closed forms."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vitguard.errors import InputError, expected
from vitguard.vit import SELECTORS, Anatomy

__all__ = ["minimal_names", "require_all_match", "select_names"]

_MINIMAL = ("plan", "minimal")
_CHOICES = (*SELECTORS, "plan")


def select_names(anatomy: Anatomy, selector: str, names: Iterable[str]) -> list[str]:
    """Return those of `names` that a selection means, in their own order.

    Args:
        selector: A role of `Anatomy.select`, a regular expression, `plan` (also `minimal`), or
            several joined by `/`.

    Raises:
        InputError: A part is empty, or as a regular expression matches no name, or has a role
            among its alternatives, which would be read as a pattern.
    """
    names = list(names)
    chosen: set[str] = set()
    for part in selector.split("/"):
        if part in _MINIMAL:
            chosen.update(minimal_names(anatomy, names))
        elif part in SELECTORS:
            chosen.update(anatomy.select(part, names))
        else:
            chosen.update(_matching(part, names))
    return [n for n in names if n in chosen]


def require_all_match(anatomy: Anatomy, selector: str, names: Iterable[str]) -> None:
    """Refuse a selection of which a part, or one alternative of a pattern, selects nothing.

    Args:
        names: All parameters of the model, those included that no update contains.

    Raises:
        InputError: As said, or `select_names` does not accept it.
    """
    names = list(names)
    select_names(anatomy, selector, names)
    for part in selector.split("/"):
        if part in _MINIMAL or part in SELECTORS:
            continue
        for alternative in _alternatives(part):
            try:
                _matching(alternative, names)
            except InputError as error:
                got = f"{part!r}, of which {alternative!r} matches none"
                raise expected("alternatives that each match a parameter", got) from error


def _matching(part: str, names: list[str]) -> list[str]:
    """Return the names in which a regular expression is found."""
    what = f"one of {', '.join(_CHOICES)} or a regular expression that matches a parameter"
    do = f"Names look like {', '.join(names[:3])}."
    if not part:
        raise expected(what, "an empty part", do)
    for alternative in _alternatives(part):
        if alternative in (*_CHOICES, *_MINIMAL):
            raise expected(
                "a role alone or a regular expression",
                f"{part!r}, in which the role {alternative!r} would be read as a pattern",
                f"Join them by '/', as in {'/'.join(_alternatives(part))}; on the command line "
                "--encrypt can be repeated instead.",
            )
    try:
        pattern = re.compile(part)
    except re.error as error:
        raise expected(what, f"{part!r} ({error})", do) from error
    chosen = [n for n in names if pattern.search(n)]
    if not chosen:
        raise expected(what, repr(part), do)
    return chosen


def _alternatives(pattern: str) -> list[str]:
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


def minimal_names(anatomy: Anatomy, names: Iterable[str]) -> list[str]:
    """Return the smallest set by role whose encryption leaves no closed form.

    See docs/methods.md, 2.1 to 2.5c:

    - patch embedding, positions and prefix tokens: `position`, and the patches' span;
    - attention of the first block, projection included: without it neither the first norm nor,
      since every later token contains W_o o with o then unknown, any later block gives a linear
      equation about the patches;
    - second MLP layer of the last block and the head: `cascade` and the labels.

    What it leaves to gradient matching and to searches over tokens is said by `vitguard plan`.
    """
    names = list(names)
    chosen = {n for n in names if anatomy.role(n) in ("patch", "position", "token", "head")}
    if anatomy.blocks:
        first, last = anatomy.blocks[0], anatomy.blocks[-1]
        inside = (f"{first.attention}.", f"{first.proj}.", f"{last.fc2}.")
        chosen |= {n for n in names if n.startswith(inside) or n in first.qkv + first.qkv_bias}
    return [n for n in names if n in chosen]
