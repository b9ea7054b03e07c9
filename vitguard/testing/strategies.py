"""Hypothesis strategies for what a protected training handles: models, images, updates, stacks.

    from hypothesis import given
    from vitguard.testing import strategies as vgst

    @given(vgst.vits().flatmap(lambda vit: vgst.stacks(vit)))
    def test_my_loop_takes_every_stack(stack): ...

What is drawn are settings and seeds, never pixels or weights one by one: an example costs
milliseconds, and a failure shrinks to a small ViT, the first photo and a short stack. Models are
built once for each shape and copied. `st.from_type` knows `vg.Update`, `Batch`, `Defense` and
their like once Hypothesis is installed beside vitguard.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from vitguard import data
from vitguard.core import Batch, LocalTraining, Normalization, Update
from vitguard.defenses.base import Defense
from vitguard.errors import Incompatible, InputError, Unprotected, expected
from vitguard.guard import protect
from vitguard.registry import defense_types, stack_name
from vitguard.testing.contracts import alternatives
from vitguard.testing.messages import Draw
from vitguard.vit import Anatomy, canonical_parameters

__all__ = [
    "ViTShape",
    "batches",
    "defenses",
    "for_type",
    "gradients",
    "images",
    "labels",
    "local_training",
    "normalizations",
    "shapes",
    "stacks",
    "state_dicts",
    "tensors",
    "updates",
    "vits",
]

_POOL = 200  # crops of photos to choose from
_SEEDS = st.integers(0, 2**32 - 1)
KINDS = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.bool)
"""Types of the tensors in a state dict: weights first, then what must not be noised."""


@dataclass(frozen=True)
class ViTShape:
    """What a small ViT is built from; the first values are the smallest."""

    depth: int = 1
    side: int = 2
    width: int = 16
    heads: int = 2
    classes: int = 3
    patch: int = 4
    pool: Literal["token", "avg"] = "token"

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.side * self.patch


def shapes(*, depth: int = 3, side: int = 4) -> SearchStrategy[ViTShape]:
    """Shapes of ViTs with up to so many blocks, and up to `side` patches a side."""
    return st.builds(
        ViTShape,
        depth=st.integers(1, depth),
        side=st.integers(2, side),
        width=st.sampled_from((16, 32, 48)),
        heads=st.sampled_from((2, 4)),
        classes=st.sampled_from((3, 2, 10)),
        patch=st.sampled_from((4, 2)),
        pool=st.sampled_from(("token", "avg")),
    )


def vits(shape: SearchStrategy[ViTShape] | None = None) -> SearchStrategy[nn.Module]:
    """Small ViTs in training mode, three channels, each a fresh copy."""
    return (shapes() if shape is None else shape).map(lambda s: copy.deepcopy(_built(s)))


@functools.lru_cache(maxsize=256)
def _built(shape: ViTShape) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=shape.size, patch_size=shape.patch, embed_dim=shape.width, depth=shape.depth,
            num_heads=shape.heads, num_classes=shape.classes, global_pool=shape.pool,
        )  # fmt: skip
        with torch.no_grad():  # zero biases and unit gammas would hide mistakes
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.train()


@st.composite
def images(
    draw: Draw, size: tuple[int, int] = (8, 8), *, most: int = 4, channels: int = 3
) -> Tensor:
    """Crops of photos, pixels in [0, 1], shape (1 to `most`, channels, height, width)."""
    chosen = draw(st.lists(st.integers(0, _POOL - 1), min_size=1, max_size=most))
    return data.with_channels(data.decoys(_POOL, size)[chosen], channels)


@st.composite
def labels(draw: Draw, count: int, classes: int = 10) -> Tensor:
    """Class indices, shape (count,), int64."""
    if classes < 1:
        raise expected("at least one class", classes)
    chosen = st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)
    return torch.tensor(draw(chosen), dtype=torch.int64)


@st.composite
def batches(draw: Draw, model: nn.Module | None = None, *, most: int = 4) -> Batch:
    """Batches as a model takes them (normalised to mean 0.5, deviation 0.5), with labels.

    In the type of its parameters.
    """
    size, channels, classes, like = (8, 8), 3, 3, torch.float32
    if model is not None:
        anatomy, like = Anatomy.of(model), next(model.parameters()).dtype
        size, channels, classes = anatomy.image_size, anatomy.channels, anatomy.classes
    pixels = draw(images(size, most=most, channels=channels))
    inputs = (pixels * 2 - 1).to(like)
    return Batch(inputs, draw(labels(len(pixels), classes or 1)))  # 0: without a head


@st.composite
def tensors(
    draw: Draw,
    shape: Sequence[int] | None = None,
    *,
    kinds: Sequence[torch.dtype] = KINDS,
) -> Tensor:
    """Finite tensors, scalars and empty ones among them; zeros, tiny, usual or large values."""
    size = draw(st.lists(st.sampled_from((1, 2, 3, 7, 0)), max_size=3)) if shape is None else shape
    kind, seed = draw(st.sampled_from(kinds)), draw(_SEEDS)
    values = torch.randn(tuple(size), generator=torch.Generator().manual_seed(seed))
    if kind.is_floating_point:
        return (draw(st.sampled_from((1.0, 0.0, 1e-4, 1e3))) * values).to(kind)
    return (values > 0) if kind == torch.bool else (100 * values).to(kind)


def state_dicts(*, kinds: Sequence[torch.dtype] = KINDS) -> SearchStrategy[dict[str, Tensor]]:
    """Tensors by dotted names: weights, integer buffers, bfloat16, scalars and empty tensors."""
    part = st.sampled_from(("blocks", "0", "1", "weight", "bias", "num_batches_tracked"))
    name = st.lists(part, min_size=1, max_size=3).map(".".join)
    return st.dictionaries(name, tensors(kinds=kinds), max_size=4)


@st.composite
def local_training(draw: Draw) -> LocalTraining:
    """One gradient, or a difference of up to three local steps."""
    if draw(st.booleans()):
        optimizer = draw(st.sampled_from(("sgd", "adam", "adamw")))
        momentum = draw(st.sampled_from((0.0, 0.9))) if optimizer == "sgd" else 0.0
        rate, decay = draw(st.sampled_from((0.1, 1e-3))), draw(st.sampled_from((0.0, 0.01)))
        return LocalTraining(rate, draw(st.integers(1, 3)), optimizer, momentum, decay)
    return LocalTraining()


@st.composite
def updates(draw: Draw) -> Update:
    """Updates of any tensors: readable and sealed, of a gradient or a difference, payloads."""
    made = draw(state_dicts())
    sealed = draw(st.sets(st.sampled_from(sorted(made)))) if made else set()
    named: list[str] = ["one", "two"]
    return Update(
        made,
        batch_size=draw(st.integers(1, 8)),
        payloads=draw(st.dictionaries(st.sampled_from(named), st.binary(max_size=8))),
        **draw(local_training()).facts(),
    ).seal(dict.fromkeys(sorted(sealed), "sealed by a strategy"))


@st.composite
def gradients(draw: Draw, model: nn.Module | None = None) -> Update:
    """Gradients by the names and shapes of a model: random numbers, some tensors zero or large."""
    names = canonical_parameters(model if model is not None else _built(ViTShape()))
    seed, scale = draw(_SEEDS), draw(st.sampled_from((1.0, 1e-4, 1e3)))
    silent = draw(st.sets(st.sampled_from(sorted(names)), max_size=2))
    generator = torch.Generator().manual_seed(seed)
    made = {n: scale * torch.randn(p.shape, generator=generator) for n, p in names.items()}
    made |= {n: torch.zeros_like(made[n]) for n in silent}
    return Update(made, batch_size=draw(st.integers(1, 8)))


def normalizations(channels: int = 3) -> SearchStrategy[Normalization]:
    """Means and deviations of pixels in [0, 1], one for each channel."""
    usual = Normalization((0.5,) * channels, (0.5,) * channels)

    def numbers(low: float, high: float) -> SearchStrategy[tuple[float, ...]]:
        return st.tuples(*[st.floats(low, high)] * channels)

    other = st.builds(Normalization, numbers(0, 1), numbers(0.05, 1))
    return st.one_of(st.just(usual), other)


@st.composite
def defenses(draw: Draw, *kinds: type[Defense]) -> Defense:
    """Installed defenses, third parties' too: their defaults, or up to two settings changed.

    Args:
        kinds: Classes to draw from, with those derived from them; all by default.
    """
    known = [t for t in defense_types().values() if not kinds or issubclass(t, kinds)]
    if not known:
        known = list(kinds)  # a class of one's own that nothing registers
    cls = draw(st.sampled_from(sorted(known, key=lambda t: t.name)))
    hints, settings = get_type_hints(cls), {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    changed: dict[str, Any] = {}
    choices = {n: v for n in settings if (v := _values(hints[n]))}
    for name in draw(st.lists(st.sampled_from(sorted(choices)), max_size=2)) if choices else ():
        value = draw(st.sampled_from(choices[name]))
        try:
            cls(**{**changed, name: value})
        except InputError:
            continue  # does not go with the other settings
        changed[name] = value
    return cls(**changed)


def _values(hint: Any) -> list[Any]:
    """Return some values that a setting of this type may have; none of text, whose form is free."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) is tuple:
        return []
    allowed = alternatives(hint)
    values: list[Any] = []
    values += [False, True] if bool in allowed else []
    values += [1, 2, 5] if int in allowed else []
    values += [0.5, 0.25, 1.0, 3.0, 0.0] if float in allowed else []
    values += [None] if type(None) in allowed else []
    return values


def stacks(
    model: nn.Module | None = None,
    *,
    each: SearchStrategy[Defense] | None = None,
    most: int = 3,
    least: int = 0,
) -> SearchStrategy[list[Defense]]:
    """Stacks under which a model gives an update, of up to `most` defenses; shorter ones first.

    A defense that does not go with those before it is left out. Draws come from a seed, as in an
    audit: a stack that encrypts is one that rehearses.

    Args:
        each: What the defenses are drawn from; `defenses()` by default.
    """
    target = model if model is not None else _built(ViTShape())
    one = defenses() if each is None else each
    drawn = st.lists(one, min_size=least, max_size=most, unique_by=lambda d: d.name)
    return drawn.map(lambda given: _valid(target, given)).filter(lambda s: len(s) >= least)


def _valid(model: nn.Module, given: Sequence[Defense]) -> list[Defense]:
    stack: list[Defense] = []
    for defense in given:
        if _takes(model, (*stack, defense)):
            stack.append(defense)
    return stack


_TAKEN: dict[tuple[object, str], bool] = {}


def _takes(model: nn.Module, stack: Sequence[Defense]) -> bool:
    # all that a stack may be refused for: what is frozen or fixed already, types, other layers
    named = (*model.named_parameters(), *model.named_buffers())
    parts = tuple((n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in named)
    layers = tuple(type(m) for m in model.modules())
    key = (layers, parts), stack_name(stack)
    if key not in _TAKEN:
        _TAKEN[key] = _gives_an_update(copy.deepcopy(model).train(), stack)
    return _TAKEN[key]


def _gives_an_update(model: nn.Module, stack: Sequence[Defense]) -> bool:
    anatomy = Anatomy.of(model)
    images = data.sample_images(anatomy.image_size, count=1).pixels
    images = data.with_channels(images, anatomy.channels).to(next(model.parameters()))
    try:
        guard = protect(model, stack, generator=torch.Generator().manual_seed(0))
        with guard.ungated():
            guard.update(images, torch.tensor([0], device=images.device))
    except (Incompatible, InputError, Unprotected):
        return False
    return True


_OF: Mapping[type, Any] = {
    Batch: batches,
    LocalTraining: local_training,
    Normalization: normalizations,
    Update: updates,
}


def for_type(kind: type) -> SearchStrategy[Any]:
    """Return the strategy of a type of vitguard: of what is in a training, or of a defense."""
    if issubclass(kind, Defense):
        return defenses(kind)
    return _OF[kind]()
