"""Which parameters a training moves, and so which an update holds: `vitguard plan --train`."""

from __future__ import annotations

import torch
from torch import nn

from vitguard.errors import expected
from vitguard.vit import Anatomy, canonical_name

__all__ = ["trained_sizes"]

_RANK = 8


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
            found = _bottlenecks(anatomy, _rank(part, given))
        elif part == "last-block" and anatomy.blocks:
            inside = f"{anatomy.blocks[-1].name}."
            found = {n: s.numel() for n, s in shapes.items() if n.startswith(inside)}
        else:
            found = {n: shapes[n].numel() for n in anatomy.select(part, shapes)}
        if not found:
            raise expected(
                "a selection of parameters that are trained",
                f"{part!r}, of which the model has none",
                "One without classes has no head: build it with num_classes=10, say.",
            )
        chosen |= found
    return chosen


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


def _bottlenecks(anatomy: Anatomy, rank: int) -> dict[str, int]:
    width = anatomy.width
    sizes = {
        "down.weight": rank * width, "down.bias": rank, "up.weight": width * rank, "up.bias": width
    }  # fmt: skip
    return {f"{b.mlp}.adapter.{part}": n for b in anatomy.blocks for part, n in sizes.items()}
