"""Defenses and attacks by name, read from `name:key=value,...` (see `vitguard.discovery`)."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from vitguard.attacks.base import Attack, InputAttack
from vitguard.defenses.base import Defense
from vitguard.discovery import discover
from vitguard.errors import InputError, expected

__all__ = [
    "attack_types",
    "defense_types",
    "families_not_run",
    "parse_attack",
    "parse_attacks",
    "parse_one",
    "parse_stack",
    "parse_value",
    "stack_name",
]

Kind = TypeVar("Kind")
AnyAttack = Attack | InputAttack
GROUPS = ("closed-form", "ladder", "matching", "input")
_ALONE = {
    "defense": "none is the empty stack and stands alone.",
    "attack": "A group takes no settings: name its attacks, or set --iterations.",
}


@cache
def defense_types() -> dict[str, type[Defense]]:
    """Return every defense by name, in alphabetical order."""
    return discover("vitguard.defenses", Defense)


@cache
def attack_types() -> dict[str, type[AnyAttack]]:
    """Return every attack by name, in alphabetical order."""
    return discover("vitguard.attacks", Attack, InputAttack)


def parse_stack(spec: str) -> list[Defense]:
    """Read a stack such as `positions:kind=sincos+shuffle:ratio=0.7`; `none` is the empty one.

    Raises:
        InputError: An unknown name or key, or a value that the defense refuses.
    """
    if spec.strip() == "none":
        return []
    return [_build(part, defense_types(), "defense", ("none",)) for part in _split(spec)]


def stack_name(stack: Sequence[Defense]) -> str:
    """Return the spec of a stack, `none` for an empty one."""
    return "+".join(defense.spec() for defense in stack) or "none"


def parse_one(spec: str, known: dict[str, type[Kind]], kind: str) -> Kind:
    """Read `name[:key=value,...]` as one of the `known` classes; `kind` is what a message says."""
    return _build(spec, known, kind, ())


def parse_attack(spec: str, *, fast: bool = False) -> AnyAttack:
    """Read one attack such as `inverting:iterations=200`.

    Args:
        spec: Name and settings; what is not set has its default, the paper's.
        fast: Where the attack has a preset for a CPU and `spec` sets no iterations, start from it.
    """
    return _build(spec, attack_types(), "attack", (*GROUPS, "all"), fast=fast)


def parse_attacks(
    specs: str | AnyAttack | Sequence[str | AnyAttack], *, fast: bool = False
) -> list[AnyAttack]:
    """Read attacks by name, group (`closed-form`, `matching`, `input`) or `all`.

    `fast` is for a CPU, as in `parse_attack`; an attack given as an object stays what it is.
    Names are taken once each; objects that compare equal all stay: a start or a surrogate differs.
    `ladder` is the one attack that climbs every exact rung; a rung alone goes by its own name.

    Raises:
        InputError: An unknown name or setting, or something that is neither name nor attack.
    """
    attacks: list[AnyAttack] = []
    objects: set[int] = set()
    for spec in [specs] if isinstance(specs, str) or not isinstance(specs, Iterable) else specs:
        if isinstance(spec, Attack | InputAttack):
            attacks.append(spec)
            objects.add(id(spec))
        elif not isinstance(spec, str):
            raise expected(
                "attacks", repr(spec), "Give names such as 'span', or instances, not classes."
            )
        elif spec in (*GROUPS, "all") and spec not in attack_types():
            named = attack_types().items()
            attacks += [parse_attack(n, fast=fast) for n, t in named if spec in ("all", t.family)]
        else:
            attacks.append(parse_attack(spec, fast=fast))
    return list({id(a) if id(a) in objects else a: a for a in attacks}.values())


def families_not_run(attacks: Sequence[AnyAttack]) -> tuple[str, ...]:
    """Return the families of attacks of which nothing is among `attacks`."""
    run = {family for a in attacks for family in (a.family, *a.covers)}
    return tuple(family for family in GROUPS if family not in run)


def _split(spec: str) -> list[str]:
    """Split a stack at each `+` that is followed by a name, not by a number as in `1e+3`."""
    parts: list[str] = []
    for piece in spec.split("+"):
        if parts and piece[:1].isdigit():
            parts[-1] += f"+{piece}"
        else:
            parts.append(piece)
    return parts


def _build(
    spec: str,
    known: dict[str, type[Kind]],
    kind: str,
    also: tuple[str, ...],
    *,
    fast: bool = False,
) -> Kind:
    name, _, rest = spec.strip().partition(":")
    if name not in known:
        if name in also:
            raise expected(f"one {kind}", repr(spec), _ALONE[kind])
        choices = dict.fromkeys((*known, *also))
        near = _nearest(name, choices)
        raise expected(f"one {kind} among {', '.join(choices)}", repr(name), near)
    cls = known[name]
    hints = get_type_hints(cls)
    settings = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for item in rest.split(",") if rest else []:
        key, equals, text = item.partition("=")
        if not equals or key not in settings:
            keys = ", ".join(settings) or "no settings"
            near = _nearest(key, settings)
            raise expected(f"{name} settings among {keys} as key=value", repr(item), near)
        if key in values:
            raise expected(f"{name}:{key} once", f"it twice in {spec!r}")
        values[key] = parse_value(text, hints[key], f"{name}:{key}")
    missing = [
        k
        for k, f in settings.items()
        if f.default is MISSING and f.default_factory is MISSING and k not in values
    ]
    if missing:
        raise expected(f"{kind} {name} with {', '.join(f'{k}=...' for k in missing)}", repr(spec))
    preset = getattr(cls, "fast", None) if fast and "iterations" not in values else None
    try:
        return cls(**values) if preset is None else preset(**values)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _nearest(text: str, choices: Iterable[str]) -> str:
    text = text.lower()
    begun = [c for c in choices if text.startswith(c)]  # withheld-positions: withheld
    begun += [c for c in choices if text and c.startswith(text)]  # eps: epsilon
    near = begun or get_close_matches(text, choices, n=1)
    return f"Did you mean {near[0]}?" if near else ""


def parse_value(text: str, hint: Any, where: str) -> Any:
    """Read one setting by its type annotation; tuples are written `a/b/c`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        for choice in arguments:
            if str(choice) == text:
                return choice
        raise expected(f"{where} among {', '.join(map(str, arguments))}", repr(text))
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        errors: InputError | None = None
        for choice in (a for a in arguments if a is not type(None)):
            try:
                return parse_value(text, choice, where)
            except InputError as error:
                errors = error
        raise errors or expected(where, repr(text))
    if origin is tuple:
        return tuple(parse_value(part, arguments[0], where) for part in text.split("/"))
    if hint is bool:
        if text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        raise expected(f"{where} true or false", repr(text))
    if hint in (int, float, str):
        try:
            return hint(text)
        except ValueError:
            raise expected(f"{where} as {hint.__name__}", repr(text)) from None
    raise expected(f"{where} to be set in Python, not on the command line", repr(text))
