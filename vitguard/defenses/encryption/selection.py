"""Selections: which parameters are encrypted, and the smallest set that ends the closed forms."""

from __future__ import annotations

from collections.abc import Iterable

from vitguard.errors import InputError, expected
from vitguard.selectors import SELECTORS, alternatives, matching
from vitguard.vit import Anatomy

__all__ = ["minimal_names", "require_all_match", "select_names"]

_MINIMAL = ("minimal", "plan")
_CHOICES = (*SELECTORS, *_MINIMAL)


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
        for alternative in alternatives(part):
            try:
                _matching(alternative, names)
            except InputError as error:
                got = f"{part!r}, of which {alternative!r} matches none"
                raise expected("alternatives that each match a parameter", got) from error


def _matching(part: str, names: list[str]) -> list[str]:
    joined = "/".join(alternatives(part))
    join = f"Join them by '/', as in {joined}; on the command line --encrypt can be repeated."
    return matching(part, names, _CHOICES, join)


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
