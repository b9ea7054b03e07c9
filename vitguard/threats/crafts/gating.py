"""How frozen layers decide which tokens a row of an adapter or of LoRA sees."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.core import Bins
from vitguard.threats.crafts.channels import Channels
from vitguard.vit import Block

__all__ = ["attend", "hand_on", "scale_norm", "stand_for", "turn_to"]

_SURE = 60.0  # score of a position before all others, in the exponent of attention

State = Mapping[str, Tensor]


def scale_norm(state: State, norm: str, size: float, *, counts: bool) -> None:
    """Write a norm; where it counts it adds a constant to all channels.

    A token has mean zero, so that the mean of a row's gradient tells the sum of the weights of its
    tokens, as the gradient of a bias does where the layer has one.
    """
    state[f"{norm}.weight"].fill_(size)
    state[f"{norm}.bias"].fill_(size if counts else 0.0)


def hand_on(state: State, block: Block) -> None:
    """Let an MLP give what it reads: GELU(x) - GELU(-x) = x."""
    fc1, fc2 = state[f"{block.fc1}.weight"], state[f"{block.fc2}.weight"]
    eye = torch.eye(fc1.shape[1], dtype=fc1.dtype)
    fc1.zero_()
    fc1[: len(eye)], fc1[len(eye) : 2 * len(eye)] = eye, -eye
    fc2.copy_(fc1.T)
    if f"{block.fc1}.bias" in state:
        state[f"{block.fc1}.bias"].zero_()


def stand_for(state: State, bins: Bins) -> None:
    """Let A of LoRA stand for the first rows of fc1: A = 0, and B picks them."""
    up = _up(state, bins)
    up.copy_(torch.eye(*up.shape, dtype=up.dtype))


def attend(
    state: State,
    bins: Bins,
    block: Block,
    rows: Float[Tensor, "rows width"],
    channels: Channels,
    prefix: Float[Tensor, " width"],
) -> None:
    """Let each row of A see the token that one attention head turns to.

    All queries are one constant. The key of a token is what a row makes of it; that of the class
    token is 0. The values are 0, so that tokens stay what they are, and their gradient is that
    along `signal`.

    Args:
        rows: One for each head that is used.
        prefix: The class token as it enters the first block.
    """
    width, size = len(prefix), len(prefix) // block.heads
    rows = rows - (rows @ prefix / (prefix @ channels.sink))[:, None] * channels.sink
    at = torch.arange(len(rows)) * size
    for name in (*block.qkv, *block.qkv_bias):
        state[name].zero_()
    _part(state, block.qkv, 1)[at] = rows * size**0.5
    _part(state, block.qkv_bias, 0)[at] = 1.0
    state[f"{bins.out}.weight"][:, at] = channels.signal[:, None].expand(-1, len(at))
    up = _up(state, bins)
    up[len(up) - width + at, torch.arange(len(at))] = 1.0


def turn_to(
    state: State, block: Block, row: Float[Tensor, " width"], size: float, length: float
) -> None:
    """Let all heads turn to one position, so that attention gives its token after LayerNorm.

    All queries are one constant. The key of the class token is 0.

    Args:
        row: What tells the position: at least 1 there before LayerNorm, below 0 elsewhere.
        size: By which LayerNorm divides a token of that position, about.
        length: Factor on what attention gives.
    """
    width, many = len(row), len(row) // block.heads
    for name in (*block.qkv, *block.qkv_bias):
        state[name].zero_()
    at = torch.arange(block.heads) * many
    _part(state, block.qkv, 1)[at] = _SURE * size * many**0.5 * row
    _part(state, block.qkv_bias, 0)[at] = 1.0
    eye = torch.eye(width, dtype=row.dtype)
    _part(state, block.qkv, 2).copy_(eye)
    state[f"{block.proj}.weight"].copy_(length * eye)


def _up(state: State, bins: Bins) -> Tensor:
    """Return B of LoRA."""
    return state[bins.layer.replace(".lora_A.", ".lora_B.") + ".weight"]


def _part(state: State, names: tuple[str, ...], part: int) -> Tensor:
    """Return the part of queries, keys or values, in one tensor or three."""
    tensors = [state[name] for name in names]
    return tensors[part] if len(tensors) > 1 else tensors[0].chunk(3)[part]
