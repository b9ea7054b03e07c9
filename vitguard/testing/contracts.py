"""What every defense and attack must hold, built in or third party.

Each function raises AssertionError with a sentence that says what is broken. Run them on your own
class as vitguard's tests do on all that the registry finds:

    from vitguard.testing import contracts

    def test_contract():
        contracts.check_settings(MyAttack)
        contracts.check_attack(MyAttack())
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from vitguard.attacks.base import Attack, InputAttack, Rung
from vitguard.core import Guess, Normalization, Update, View
from vitguard.defenses.base import Defense, written
from vitguard.errors import Blocked, InputError, NotApplicable
from vitguard.guard import protect
from vitguard.models import AprilViT
from vitguard.registry import parse_attack, parse_stack
from vitguard.threats.curious_server import CuriousServer

__all__ = [
    "check_attack",
    "check_documented",
    "check_plain",
    "check_refuses_nan",
    "check_round_trip",
    "check_settings",
    "damaged_views",
]

AnyType = type[Defense] | type[Attack] | type[InputAttack]
_PLAIN = (bool, int, float, str)


def check_settings(cls: AnyType) -> None:
    """Run every check of a class and its settings."""
    check_documented(cls)
    check_round_trip(cls)
    check_refuses_nan(cls)
    check_plain(cls())


def check_documented(cls: AnyType) -> None:
    """A frozen dataclass with a name and a docstring of its own; a defense says its guarantees."""
    parameters = getattr(cls, "__dataclass_params__", None)
    assert is_dataclass(cls) and parameters and parameters.frozen, f"{cls} is no frozen dataclass"
    assert isinstance(cls.name, str) and cls.name, f"{cls} has no name"
    taken = {f.name for f in fields(cls)} & {n for n in dir(_base(cls)) if not n.startswith("_")}
    assert not taken, f"{cls.name} has settings named as the base's methods: {', '.join(taken)}"
    text = cls.__doc__ or ""
    assert text and not text.startswith(f"{cls.__name__}("), f"{cls.name} has no docstring"
    if issubclass(cls, Defense):
        assert "Guarantees:" in text, f"{cls.name} does not say what it guarantees"
    else:
        families = ("closed-form", "ladder", "matching", "input")
        assert cls.family in families, f"{cls.name} has no family among {', '.join(families)}"
        rung = getattr(cls, "rung", None)
        assert rung is None or isinstance(rung, Rung), f"{cls.name} has a rung that is no Rung"


def _base(cls: AnyType) -> type:
    return next(b for b in (Defense, Attack, InputAttack) if issubclass(cls, b))


def check_round_trip(cls: AnyType) -> None:
    """The command line's form of the settings gives an equal object back."""
    thing = cls()
    read = (lambda spec: parse_stack(spec)[0]) if isinstance(thing, Defense) else parse_attack
    assert read(cls.name) == thing, f"{cls.name} by its name alone is not its default"
    for item in _settable(cls):
        spec = f"{cls.name}:{item.name}={written(getattr(thing, item.name))}"
        assert read(spec) == thing, f"{spec} is not the default it was written from"
        for value in _others(cls, item):
            try:
                changed = replace(thing, **{item.name: value})  # type: ignore[type-var]
            except InputError:
                continue  # a value that does not go with the other defaults
            spec = f"{cls.name}:{item.name}={written(value)}"
            assert read(spec) == changed, f"{spec} does not give {value!r} back"
            if isinstance(changed, Defense):
                assert read(changed.spec()) == changed, f"{changed.spec()} is not {changed!r}"


def check_refuses_nan(cls: AnyType) -> None:
    """No number may be NaN: a comparison with it is always false and so never protects."""
    for item in _settable(cls):
        if float not in alternatives(_hints(cls)[item.name]):
            continue
        try:
            cls(**{item.name: math.nan})
        except InputError:
            continue
        raise AssertionError(f"{cls.name} takes NaN as {item.name}")


def check_plain(thing: Defense | Attack | InputAttack) -> None:
    """Settings and repr hold plain values only: no tensor, generator, key or model."""
    for key, value in thing.settings().items():
        parts = value if isinstance(value, tuple) else (value,)
        assert all(p is None or isinstance(p, _PLAIN) for p in parts), (
            f"{thing.name} shows a {type(value).__name__} in its setting {key}"
        )
    for secret in ("tensor(", "Generator", "b'", "key="):
        assert secret not in repr(thing), f"the repr of {thing.name} shows {secret}"


def check_attack(attack: Attack) -> None:
    """On any update: a finite image in [0, 1], or Blocked or NotApplicable; nothing else."""
    for label, view in damaged_views():
        try:
            guess = attack.run(view, torch.Generator().manual_seed(0))
        except (Blocked, NotApplicable):
            continue
        check_guess(guess, view, f"{attack.name} on {label}")


def check_guess(guess: Guess, view: View, where: str) -> None:
    """The images are finite pixels of the right shape; labels are classes. One of them is there."""
    images = guess.images
    assert images.dim() == 4 and images.shape[1:] == view.image_shape, f"{where}: {images.shape}"
    assert len(images) >= 1 or guess.labels is not None, f"{where}: neither images nor labels"
    assert bool(images.isfinite().all()), f"{where}: not finite"
    assert bool(((images >= 0) & (images <= 1)).all()), f"{where}: outside [0, 1]"
    if guess.labels is not None:
        assert guess.labels.shape == (view.update.batch_size,), f"{where}: {guess.labels.shape}"
        low, high = int(guess.labels.min()), int(guess.labels.max())
        assert low >= 0 and high < view.classes, f"{where}: labels {low} to {high}"


def damaged_views() -> Iterator[tuple[str, View]]:
    """Return views of one real update after each kind of damage, with its description."""
    for model_name, model in _models():
        guard = protect(model, [])
        images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        update = guard.update(images * 2 - 1, torch.tensor([1]))
        for label, damaged in _damages(update):
            yield f"{model_name}, {label}", CuriousServer().view(guard, damaged, Normalization())
        for role in ("patch", "position", "attention", "mlp", "head", "norm", "all"):
            if guard.anatomy.select(role, update.tensors):
                view = CuriousServer((role,)).view(guard, update, Normalization())
                yield f"{model_name}, {role} withheld", view


def _models() -> Iterator[tuple[str, torch.nn.Module]]:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 64, "num_heads": 2}
        yield "vit", VisionTransformer(**sizes, depth=2, num_classes=3)
        yield "april_vit", AprilViT(8, 4, 64, 1, 2, 3)


def _damages(update: Update) -> Iterator[tuple[str, Update]]:
    def each(change: Any) -> Update:
        return replace(update, tensors={k: change(t) for k, t in update.tensors.items()})

    generator = torch.Generator().manual_seed(2)

    def spoiled(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[(0,) * tensor.dim()] = math.nan
        return tensor

    yield "as it is", update
    yield "zeros", each(torch.zeros_like)
    yield "NaN", each(lambda t: torch.full_like(t, math.nan))
    yield "one NaN in each tensor", each(spoiled)
    yield "infinity", each(lambda t: torch.full_like(t, math.inf))
    yield "ones", each(torch.ones_like)
    yield "random values", each(lambda t: torch.randn(t.shape, generator=generator))
    yield "huge", each(lambda t: t * 1e30)
    yield "tiny", each(lambda t: t * 1e-30)
    yield "another batch size", replace(update, batch_size=3)
    yield "a difference at an unknown rate", replace(update, kind="difference")
    adam: Mapping[str, Any] = {"kind": "difference", "learning_rate": 0.1, "optimizer": "adamw"}
    yield "a difference by adamw", replace(update, **adam)
    yield "nothing", replace(update, tensors={})


def _settable(cls: AnyType) -> list[Field[Any]]:
    """Return the fields that the command line can set."""
    return [
        f
        for f in fields(cls)  # type: ignore[arg-type]
        if f.init and any(a in _PLAIN for a in alternatives(_hints(cls)[f.name]))
    ]


def _hints(cls: AnyType) -> dict[str, Any]:
    return get_type_hints(cls)


def alternatives(hint: Any) -> set[Any]:
    """Return the plain types that a hint allows: of unions, of tuples, of literals."""
    if get_origin(hint) is Literal:
        return {type(a) for a in get_args(hint)}
    if get_origin(hint) in (tuple, typing.Union, types.UnionType):
        return set().union(*(alternatives(a) for a in get_args(hint) if a is not Ellipsis))
    return {hint}


def _others(cls: AnyType, item: Field[Any]) -> list[Any]:
    """Return some further values that a field might take."""
    hint = _hints(cls)[item.name]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    allowed = alternatives(hint)
    values: list[Any] = []
    values += [True, False] if bool in allowed else []
    values += [1, 7] if int in allowed else []
    values += [0.25, 1e-07, 3e20] if float in allowed and get_origin(hint) is not tuple else []
    values += [None] if type(None) in allowed else []
    return values
