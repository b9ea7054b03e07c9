"""Selections: parameters named by their role, by a plan or by a regular expression."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from vitguard.errors import InputError, expected

__all__ = [
    "SELECTORS",
    "alternatives",
    "minimal_names",
    "require_all_match",
    "select_names",
    "several",
]

SELECTORS = ("attention", "mlp", "patch", "position", "token", "norm", "head", "embedding", "all")
_EMBEDDING = ("patch", "position", "token")
_MINIMAL = ("minimal", "plan")
_CHOICES = (*SELECTORS, *_MINIMAL)


@runtime_checkable
class Roles(Protocol):
    """What a selection asks an `Anatomy`: the role of each parameter, and its blocks."""

    @property
    def blocks(self) -> Sequence[Any]: ...

    @property
    def readers(self) -> Sequence[Any]: ...

    def role(self, name: str) -> str: ...


def several(selectors: object) -> tuple[str, ...]:
    """Return selectors as a tuple; a lone one is no sequence of letters.

    Raises:
        InputError: Something that is no text, nor several texts.
    """
    given = (selectors,) if isinstance(selectors, str) else selectors
    found: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(selector, str) for selector in found):
        raise expected("a selection as text, or several", repr(selectors), _AS_TEXT)
    return found


_AS_TEXT = "Several parts of one are joined by '/', as in 'attention/mlp'."


def select_names(anatomy: Roles, selector: str, names: Iterable[str]) -> list[str]:
    """Return those of `names` that a selection means, in their own order.

    The one grammar of everything that selects parameters: what is encrypted, what is withheld, what
    an attack compares.

    Args:
        selector: A role (`SELECTORS`; `embedding` is patch, position and token), `plan` (also
            `minimal`, see `minimal_names`), a regular expression that is found in a name, or
            several of these joined by `/`.

    Raises:
        InputError: A part is empty, or as a regular expression matches no name, or has a role
            among its alternatives, which would be read as a pattern.
    """
    if not isinstance(selector, str):
        raise expected("a selection as text", repr(selector), _AS_TEXT)
    names = list(names)
    chosen: set[str] = set()
    for part in selector.split("/"):
        if part in _MINIMAL:
            chosen.update(minimal_names(anatomy, names))
        elif part in SELECTORS:
            chosen.update(_of_role(anatomy, part, names))
        else:
            chosen.update(_matching(part, names))
    return [n for n in names if n in chosen]


def require_all_match(anatomy: Roles, selector: str, names: Iterable[str]) -> None:
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


def minimal_names(anatomy: Roles, names: Iterable[str]) -> list[str]:
    """Return the smallest set by role whose encryption leaves no closed form and no token search.

    At batch size 1, where they are strongest. See docs/methods.md, 2.1 to 2.5e:

    - patch embedding, positions and prefix tokens: `position`, and the patches' span;
    - attention of the first block, projection included: without it neither the first norm nor,
      since every later token contains W_o o with o then unknown, any later block gives a linear
      equation about the patches;
    - the head and the second MLP layer of the last block: labels and `cascade`;
    - the second MLP layer of every other block: one with both layers plain gives `deep-tokens` all
      tokens of an image, and they the image, or some where they fill the width.

    Of what reads the tokens behind the blocks (`Anatomy.readers`) it is the second MLP layer too.

    Of a model whose blocks were not recognised it is everything: nothing shows that less would do.
    What it leaves to gradient matching and to searches over pixels is said by `vitguard plan`.
    """
    names = list(names)
    if not anatomy.blocks:
        return names
    chosen = {n for n in names if anatomy.role(n) in (*_EMBEDDING, "head")}
    first, late = anatomy.blocks[0], (*anatomy.blocks, *anatomy.readers)
    inside = (f"{first.attention}.", f"{first.proj}.", *(f"{b.fc2}." for b in late))
    chosen |= {n for n in names if n.startswith(inside) or n in first.qkv + first.qkv_bias}
    return [n for n in names if n in chosen]


def _of_role(anatomy: Roles, role: str, names: Sequence[str]) -> list[str]:
    wanted = _EMBEDDING if role == "embedding" else (role,)
    return [n for n in names if role == "all" or anatomy.role(n) in wanted]


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Return those of `names` in which a regular expression is found; it must name one."""
    what = f"one of {', '.join(_CHOICES)} or a regular expression that matches a parameter"
    do = f"Names look like {', '.join(names[:3])}."
    if not pattern:
        raise expected(what, "an empty part", do)
    parts = alternatives(pattern)
    if role := next((one for one in parts if one in _CHOICES), ""):
        raise expected(
            "a role alone or a regular expression",
            f"{pattern!r}, in which the role {role!r} would be read as a pattern",
            f"Join them by '/', as in {'/'.join(parts)}; on the command line repeat the option.",
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
