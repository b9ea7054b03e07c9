"""The trained layers of a model whose rows a server can use as bins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitguard.attacks.equations.head import linear_heads
from vitguard.core.crafted import BinKind
from vitguard.errors import NotApplicable
from vitguard.threats.crafts.pools import averages, pools_first
from vitguard.vit import Anatomy, Block, canonical_name, canonical_parameters

__all__ = ["Home", "bottlenecks", "homes_of"]

_LAST = ".weight"


@dataclass(frozen=True)
class Home:
    """A trained layer that can hold bins.

    Args:
        block: Where it is.
        kind, layer, out: As in `Bins`.
        rows: How many bins there is room for.
        even, turned: As in `Bins`.
    """

    block: Block
    kind: BinKind
    layer: str
    out: str
    rows: int
    even: bool = False
    turned: bool = False


def homes_of(model: nn.Module, anatomy: Anatomy) -> list[Home]:
    """Return one layer for each block that has one, the one with most rows where it has several.

    fc1 where it is trained, or where nothing in the blocks is. Else a bottleneck adapter that reads
    what the MLP reads or gives, LoRA beside fc1, LoRA beside the values of the attention. Where no
    block has any of these: an adapter that reads what the attention gives. The head, where it is
    trained and nothing in the blocks is.

    Raises:
        NotApplicable: What is trained in the blocks is something else.
    """
    blocks = usable_blocks(anatomy)
    trained = {n: len(p) for n, p in canonical_parameters(model).items()}
    inside = [n for n in trained if n.startswith(tuple(f"{b.name}." for b in blocks))]
    own = {canonical_name(n): len(p) for n, p in model.named_parameters()}
    if not inside and (alone := _head(model, anatomy, trained)):
        return [alone]
    whole = [b for b in blocks if f"{b.fc1}.weight" in trained] if inside else blocks
    found = [Home(b, "mlp", b.fc1, b.fc2, own[f"{b.fc1}.weight"]) for b in whole]
    if not found:
        every = [*_adapters(model, blocks), *_beside(trained, own, blocks)]
        narrow = [home for home in every if home.kind != "behind"] or every
        best = [max((h for h in narrow if h.block is b), key=_room, default=None) for b in blocks]
        found = [home for home in best if home is not None]
    return _reached(model, anatomy, found)


def _reached(model: nn.Module, anatomy: Anatomy, found: list[Home]) -> list[Home]:
    """Return the homes that get a gradient of every token.

    An average of tokens hands it to all blocks. Under a class token the last block spreads it over
    all tokens, as it does where an adapter makes tokens longer. Where no other block has room its
    MLP sees the class token, which turns to one position of each image.
    """
    if averages(anatomy) and found and not any(home.kind == "serial" for home in found):
        even = pools_first(model, anatomy)
        return [replace(home, even=even or home.even) for home in found]
    inner = [home for home in found if home.block is not anatomy.blocks[-1]]
    sees = ("mlp", "parallel", "lora")  # what the MLP reads
    if not inner and found and found[0].kind in sees and _turns(anatomy):
        return [replace(found[0], even=True, turned=True)]
    if not inner:
        raise NotApplicable(
            "what is trained in the blocks that can hold bins is neither fc1, nor an adapter that "
            "reads what the MLP reads, or what the MLP or the attention gives, nor LoRA beside fc1 "
            "or the values of the attention"
        )
    return inner


def _head(model: nn.Module, anatomy: Anatomy, trained: dict[str, int]) -> Home | None:
    """Return the head where it is trained, and reads class tokens that can turn to a position."""
    heads = linear_heads(model, anatomy)
    names = [canonical_name(f"{head}.{part}") for head in heads for part in ("weight", "bias")]
    if len(heads) != 1 or not _turns(anatomy) or not all(name in trained for name in names):
        return None
    rows = trained[names[0]]
    return Home(anatomy.blocks[-1], "head", heads[0], heads[0], rows, even=True, turned=True)


def _turns(anatomy: Anatomy) -> bool:
    """Whether the head reads class tokens alone, which the last block can turn to a position."""
    last = anatomy.blocks[-1]
    known = bool(last.qkv and last.qkv_bias and last.heads)
    return anatomy.pooling == "token" and anatomy.prefix_tokens > 0 and known


def usable_blocks(anatomy: Anatomy) -> tuple[Block, ...]:
    """Return the blocks, all of which can hold bins.

    Raises:
        NotApplicable: The architecture is another one.
    """
    anatomy.require_plain_embedding()
    for b in anatomy.blocks:
        if not (b.pre_norm and b.residual and b.centred) or b.gated:
            raise NotApplicable(f"{b.name} is no block of LayerNorm, attention and a plain MLP")
    if not anatomy.classes:
        raise NotApplicable("a model without a head")
    return anatomy.blocks


def _room(home: Home) -> tuple[int, bool]:
    return home.rows, home.kind != "value"


def _beside(
    trained: dict[str, int], own: dict[str, int], blocks: tuple[Block, ...]
) -> Iterator[Home]:
    """Yield the matrices A of LoRA beside fc1 and beside the layer that makes the values."""
    for name, rank in trained.items():
        base, found, _ = name.partition(".lora_A.")
        layer = name.removesuffix(_LAST)
        for b in blocks if found else ():
            if base == b.fc1:
                yield Home(b, "lora", layer, b.fc2, min(rank, own[f"{b.fc1}.weight"]))
            elif b.qkv and base == b.qkv[-1].removesuffix(_LAST) and b.heads and b.qkv_bias:
                yield Home(b, "value", layer, b.proj, min(rank, b.heads), even=True)


def _adapters(model: nn.Module, blocks: tuple[Block, ...]) -> Iterator[Home]:
    """Yield the adapters: a linear layer to other channels, followed by one back."""
    pairs = [(b, down, up) for b in blocks for down, up in bottlenecks(model, b)]
    if not pairs:
        return
    seen = _inputs(model, {n for b, down, _ in pairs for n in (down, b.fc1)}, pairs)
    for b, down, up in pairs:
        read, rows = seen.get(down), _linear(model, down).out_features
        if read is None or not _linear(model, down).weight.requires_grad:
            continue
        if _same(read, seen.get(b.fc1)):
            yield Home(b, "parallel", down, up, rows)
        elif _same(read, seen.get(f"{b.mlp} gives")) and _passes(model, b):
            yield Home(b, "serial", down, up, rows)
        elif _same(read, seen.get(f"{b.attention} gives")) and b.qkv_bias and b.heads:
            yield Home(b, "behind", down, up, rows, even=True)


def _passes(model: nn.Module, block: Block) -> bool:
    """Whether the MLP has two hidden values for each channel, to hand a token on unchanged."""
    fc1 = _linear(model, block.fc1)
    return fc1.out_features >= 2 * fc1.in_features


def bottlenecks(model: nn.Module, block: Block) -> Iterator[tuple[str, str]]:
    """Yield the names of each pair of layers of a block that are none of its own: down, up."""
    known = {block.proj, block.fc1, block.fc2, *(n.removesuffix(_LAST) for n in block.qkv)}
    width = _linear(model, block.fc1).in_features
    named = model.get_submodule(block.name).named_modules(prefix=block.name)
    layers = [(n, m) for n, m in named if isinstance(m, nn.Linear) and "lora_" not in n]
    layers = [
        (n, m) for n, m in layers if canonical_name(f"{n}.weight").removesuffix(_LAST) not in known
    ]
    i = 0
    while i + 1 < len(layers):
        (down, first), (up, second) = layers[i : i + 2]
        there = (first.in_features, first.out_features) == (width, second.in_features)
        i += 1
        if there and second.out_features == width:
            yield down, up
            i += 1


def _inputs(
    model: nn.Module, layers: set[str], pairs: list[tuple[Block, str, str]]
) -> dict[str, Tensor]:
    """Return what layers read, and what MLPs and attention give, of one drawn image."""
    model = copy.deepcopy(model).eval()
    seen: dict[str, Tensor] = {}

    def reads(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, args: seen.update({name: args[0]})

    def gives(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: seen.update({name: output})

    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(reads(name))
    for block, _, _ in pairs:
        model.get_submodule(block.fc2).register_forward_hook(gives(f"{block.mlp} gives"))
        model.get_submodule(block.proj).register_forward_hook(gives(f"{block.attention} gives"))
    anatomy, like = Anatomy.of(model), next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, anatomy.channels, *anatomy.image_size, generator=generator)
    with torch.no_grad():
        model(image.to(like))
    return seen


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    base = getattr(module, "base_layer", module)
    assert isinstance(base, nn.Linear)
    return base


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and bool(torch.equal(one, other))
