"""What a client trains, and so sends: all, the head, the last block, LoRA, or a selection."""

from __future__ import annotations

from torch import nn

from vitguard.errors import expected
from vitguard.vit import Anatomy, canonical_parameters

__all__ = ["PARTS", "sent_sizes"]

PARTS = ("all", "head", "last-block", "lora")
_RANK = 8


def sent_sizes(model: nn.Module, anatomy: Anatomy, train: str = "all") -> dict[str, int]:
    """Return the values of each tensor that a client sends which trains a part of a model, by name.

    Args:
        train: `all`, `head`, `last-block` (with the final norm and the head), `lora` or
            `lora:rank=R` (adapters of rank 8, or R, beside query, key and value of every block, and
            the head), or a selection as `EncryptedGradients` takes it.

    Raises:
        InputError: A rank below 1, or a selection that names nothing.
    """
    every = {n: p.numel() for n, p in canonical_parameters(model).items()}
    head = {n: count for n, count in every.items() if anatomy.role(n) == "head"}
    part, _, rank = train.partition(":rank=")
    if part == "lora":
        return _adapters(anatomy, every, _rank(rank)) | head
    if train == "last-block":
        last = f"{anatomy.blocks[-1].name}." if anatomy.blocks else ""
        inside = tuple(f"{block.name}." for block in anatomy.blocks)
        after = [n for n in every if anatomy.role(n) == "norm" and not n.startswith(inside)]
        after = [n for n in after if "pre" not in n]
        return {n: c for n, c in every.items() if n.startswith(last) or n in after or n in head}
    names = anatomy.select(train, every)
    if not names:
        raise expected(f"{', '.join(PARTS)} or a selection of parameters to train", repr(train))
    return {n: every[n] for n in names}


def _rank(text: str) -> int:
    if text and not (text.isdecimal() and int(text) >= 1):
        raise expected("a rank of LoRA of at least 1", repr(text))
    return int(text or _RANK)


def _adapters(anatomy: Anatomy, sizes: dict[str, int], rank: int) -> dict[str, int]:
    """Return the two matrices beside each query-key-value layer, named as peft names them."""
    found = {}
    for layer in (n for block in anatomy.blocks for n in block.qkv):
        stem, count = layer.removesuffix(".weight"), sizes.get(layer, 0)
        found[f"{stem}.lora_A.default.weight"] = rank * anatomy.width
        found[f"{stem}.lora_B.default.weight"] = rank * (count // anatomy.width)
    return found
