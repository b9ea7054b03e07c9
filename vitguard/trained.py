"""Which parameters a training moves, and so which an update holds: `--train` of every command."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitguard.errors import InputError, expected
from vitguard.vit import Anatomy, Block, canonical_name

__all__ = ["adds_layers", "train_only", "trained_sizes"]

_RANK = 8
_STEPS = 0.02
"""Deviation of what is zero before the first step of an adapter, as after some steps."""


def trained_sizes(model: nn.Module, anatomy: Anatomy, train: str) -> dict[str, int]:
    """Return the number of values of each trained parameter, by canonical name.

    Args:
        model: Without adapters.
        train: A selection as in `select_names`, `last-block`, `lora:r=4` (matrices of rank 4 beside
            query, key and value of every block, by PEFT's names), `adapters:r=16` (a bottleneck of
            that width beside every MLP), or several joined by `/`, such as `lora:r=4/head`.

    Raises:
        InputError: A part names nothing, or has a setting that it does not know.
    """
    shapes = {canonical_name(n): p.shape for n, p in model.named_parameters()}
    chosen: dict[str, int] = {}
    for part in train.split("/"):
        kind, _, given = part.partition(":")
        if kind == "lora":
            found = _lora(anatomy, shapes, _rank(part, given))
        elif kind == "adapters":
            found = _bottlenecks(anatomy, shapes, _rank(part, given))
        elif part == "last-block" and anatomy.blocks:
            inside = f"{anatomy.blocks[-1].name}."
            found = {n: s.numel() for n, s in shapes.items() if n.startswith(inside)}
        else:
            found = {n: shapes[n].numel() for n in _selected(part, anatomy, shapes)}
        if not found:
            raise expected(
                "a selection of parameters that are trained",
                f"{part!r}, of which the model has none",
                "One without classes has no head: build it with num_classes=10, say.",
            )
        chosen |= found
    return chosen


def _selected(part: str, anatomy: Anatomy, shapes: Iterable[str]) -> list[str]:
    try:
        return anatomy.select(part, shapes)
    except InputError as error:
        raise InputError(
            f"{error} Trained can be last-block, lora:r=4 and adapters:r=16, too."
        ) from error


def adds_layers(train: str) -> bool:
    """Whether a training adds layers that the model itself does not have: LoRA or adapters."""
    return any(part.partition(":")[0] in ("lora", "adapters") for part in train.split("/"))


def train_only(
    model: nn.Module, train: str, *, anatomy: Anatomy | None = None, seed: int = 0
) -> nn.Module:
    """Let a model train what `train` names and nothing else, in place, and return it.

    LoRA and adapters are added as after some steps: what is zero before the first one, and most of
    an update with it, is drawn with a deviation of 0.02.

    Args:
        model: Without adapters.
        train: As in `trained_sizes`.
        anatomy: For a model that is not recognised.
        seed: Of the values of what is added.

    Raises:
        InputError: A part names nothing, has a setting that it does not know, or adds a layer that
            the model never calls.
    """
    anatomy = anatomy or Anatomy.of(model)
    sizes = trained_sizes(model, anatomy, train)
    shapes = {canonical_name(n): p.shape for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(canonical_name(name) in sizes)
    like = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in train.split("/"):
            kind, _, given = part.partition(":")
            if kind == "lora":
                for block in anatomy.blocks:
                    for name in block.qkv:
                        _add_lora(model.get_submodule(name.rpartition(".")[0]), _rank(part, given))
            elif kind == "adapters":
                for block in anatomy.blocks:
                    mlp: Any = model.get_submodule(block.mlp)
                    mlp.adapter = _Bottleneck(_joined(shapes, block), _rank(part, given))
                    mlp.register_forward_hook(_bottleneck)
    model.to(like)
    if adds_layers(train):
        _require_called(model, anatomy)
    return model


def _require_called(model: nn.Module, anatomy: Anatomy) -> None:
    """Raise InputError where a layer that was added takes no part in a forward pass."""
    added = {
        f"{name}.{part}": module.get_submodule(part)
        for name, module in model.named_modules()
        for part in ("lora_A.default", "adapter.down")
        if isinstance(getattr(module, part.partition(".")[0], None), nn.Module)
    }
    called: set[str] = set()
    handles = [
        m.register_forward_pre_hook(lambda _, __, name=name: called.add(name))
        for name, m in added.items()
    ]
    modes, like = {m: m.training for m in model.modules()}, next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(like.new_zeros(1, anatomy.channels, *anatomy.image_size))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if idle := sorted(added.keys() - called):
        raise expected(
            "layers that take part in a forward pass",
            f"{idle[0]}, which the model never calls: it reads the weight beside it by itself",
            "Nothing would be trained there, by PEFT neither. Train another part.",
        )


def _add_lora(layer: Any, rank: int) -> None:
    """Put the two matrices of LoRA beside a linear layer, by PEFT's names."""
    rows, columns = layer.weight.shape
    down, up = nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows, bias=False)
    nn.init.normal_(up.weight, std=_STEPS)
    layer.lora_A, layer.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})
    layer.register_forward_hook(_low_rank)


def _low_rank(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + layer.lora_B["default"](layer.lora_A["default"](inputs[0]))


class _Bottleneck(nn.Module):
    """Down to `rank`, GELU, up again."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.normal_(self.up.weight, std=_STEPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.nn.functional.gelu(self.down(x)))


def _bottleneck(mlp: Any, _: Any, output: Tensor) -> Tensor:
    return output + mlp.adapter(output)


def _rank(part: str, given: str) -> int:
    name, _, value = given.partition("=")
    if not given:
        return _RANK
    if name != "r" or not value.isdecimal() or int(value) < 1:
        raise expected(f"{part.partition(':')[0]}:r=N with N of at least 1", repr(part))
    return int(value)


def _lora(anatomy: Anatomy, shapes: dict[str, torch.Size], rank: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for block in anatomy.blocks:
        for name in block.qkv:
            layer, _, last = name.rpartition(".")
            if last != "weight":
                raise expected(
                    "query, key and value in linear layers, which LoRA stands beside",
                    f"{name}, which is a parameter of the attention itself",
                )
            rows, columns = shapes[name]
            found[f"{layer}.lora_A.default.weight"] = rank * columns
            found[f"{layer}.lora_B.default.weight"] = rows * rank
    return found


def _bottlenecks(anatomy: Anatomy, shapes: dict[str, torch.Size], rank: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for block in anatomy.blocks:
        width, inside = _joined(shapes, block), f"{block.mlp}.adapter"
        found |= {f"{inside}.down.weight": rank * width, f"{inside}.down.bias": rank}
        found |= {f"{inside}.up.weight": width * rank, f"{inside}.up.bias": width}
    return found


def _joined(shapes: dict[str, torch.Size], block: Block) -> int:
    """Return the width of what the MLP of a block gives; those of Swin differ."""
    return shapes[f"{block.fc2}.weight"][0]
