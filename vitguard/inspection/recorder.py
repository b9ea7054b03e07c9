"""Hooks that read single tokens' and samples' shares off a training pass that runs anyway."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitguard.inspection.rows import finite, fresh_generator
from vitguard.inspection.shares import gram_of_samples, separation, token_shares
from vitguard.inspection.signs import largest
from vitguard.inspection.verdict import Sign
from vitguard.vit import Anatomy

__all__ = ["Recorder", "gated_layers"]

_FEWEST = 16
"""Patches of a batch below which the shares of single ones say nothing."""
_TOKENS = 256
"""Tokens of a batch at which steep units are counted: drawn, where there are more."""
_STEEP = 6.0
"""Beyond it GELU is a step: 0 or the identity."""


@dataclass
class Recorder:
    """What one forward and backward pass shows of each gated layer and of the head.

    Only numbers are kept. While `armed` is False the hooks do nothing.
    """

    prefix: int
    armed: bool = False
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    """Values of signs by module name."""
    came: bool = False
    """Whether a gradient came back to a gated layer since the recorder was armed."""
    few: int = 0
    """Patches of the batch, where they are too few to look at the shares of single ones."""
    overflowed: bool = False
    """Whether one had values that are not finite, as where a scaler of 16-bit training is high."""

    @property
    def finished(self) -> bool:
        """Whether a pass was read: one that overflowed shows nothing, and moves no weight."""
        return self.came and not self.overflowed

    def attach(self, model: nn.Module, anatomy: Anatomy) -> list[Any]:
        """Watch the gated layers and heads of a model; returns the handles that end it."""
        handles = []
        for name, module in model.named_modules():
            if name in anatomy.head:
                handles.append(module.register_forward_hook(_Watch(self, name, head=True)))
            elif _gated(name, module, anatomy):
                handles.append(module.register_forward_hook(_Watch(self, name)))
        return handles

    def arm(self) -> None:
        """Read the next pass, and forget the last one."""
        self.drop()
        self.armed = True

    def drop(self) -> None:
        """Read nothing, and forget what was read."""
        self.armed, self.came, self.overflowed, self.numbers = False, False, False, {}
        self.few = 0

    def signs(self) -> list[Sign]:
        """Return the signs of the pass that was read; none where none was."""
        names = {n for numbers in self.numbers.values() for n in numbers}
        found = []
        for name in sorted(names):
            places = [(w, n[name]) for w, n in self.numbers.items() if name in n]
            found += largest(name, places)
        return found

    def notes(self) -> list[str]:
        """Return what of the pass could not be looked at."""
        if not self.few:
            return []
        patches = "1 patch" if self.few == 1 else f"{self.few} patches"
        return [
            f"the shares of single patches were not looked at: the batch has {patches}, and fewer "
            f"than {_FEWEST} do not tell a craft (inspect a larger batch)"
        ]

    def forward(self, name: str, inputs: Tensor, output: Tensor, head: bool) -> None:
        """Note what the forward pass shows of a layer, and wait for its gradient."""
        if inputs.dim() < 2 or not inputs.numel() or not output.requires_grad:
            return
        kept = inputs.detach()
        self.numbers[name] = {}
        with torch.no_grad():
            if head:
                spread = output.float().amax(-1) - output.float().amin(-1)
                self.numbers[name]["logit spread"] = float(spread.max())
            else:
                flat = output.reshape(-1, output.shape[-1])
                some = flat
                if len(flat) > _TOKENS:
                    drawn = torch.randint(len(flat), (_TOKENS,), generator=fresh_generator())
                    some = flat.index_select(0, drawn.to(flat.device))
                steep = int((some.abs() > _STEEP).sum())
                self.numbers[name]["steep units"] = steep / max(some.numel(), 1)
                self.numbers[name]["silent units"] = _silent(flat, some) / max(flat.shape[1], 1)
        output.register_hook(_Gradient(self, name, kept, head))

    def backward(self, name: str, inputs: Tensor, gradient: Tensor, head: bool) -> None:
        """Note what the gradient at a layer's output shows."""
        numbers = self.numbers.setdefault(name, {})
        with torch.no_grad():
            gradient = gradient.detach()
            # added up over the tokens: what is not finite stays so
            bias = gradient.float().sum(1) if gradient.dim() == 3 else gradient.float()
            if not finite(bias):
                self.overflowed = True
                numbers["not finite"] = 1.0
                return
            if inputs.dim() != 3 or head:
                if inputs.dim() == 2:
                    numbers["lone sample"] = separation(gram_of_samples(inputs, gradient))
                return
            self.came = True
            numbers["lone sample"] = separation(gram_of_samples(None, bias))
            patches = inputs.shape[0] * (inputs.shape[1] - self.prefix)
            if patches < _FEWEST:  # one stands out in honest gradients as well
                self.few = patches
                return
            shares = token_shares(inputs, gradient, self.prefix, fresh_generator())
            if rows := shares.rows.tolist():
                numbers["lone token"] = max(rows)
                numbers["lone tokens"] = sum(share > 0.5 for share in rows) / len(rows)
            if len(shares.pairs):
                numbers["lone token in pairs"] = int(shares.pairs.sum()) / len(shares.pairs)


def _silent(tokens: Tensor, some: Tensor) -> int:
    """Return how many units no token sets off; `some` of the tokens set off most of the others."""
    quiet = (some.amax(0) < -_STEEP).nonzero()[:, 0]
    if not len(quiet) or some is tokens:
        return len(quiet)
    return int((tokens.index_select(1, quiet).amax(0) < -_STEEP).sum())


def gated_layers(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Return the names of the trained layers that a gate follows."""
    return [
        n
        for n, m in model.named_modules()
        if _gated(n, m, anatomy) and m.get_parameter("weight").requires_grad
    ]


def _gated(name: str, module: nn.Module, anatomy: Anatomy) -> bool:
    """Whether a gate follows a layer: fc1 of a block, or one of an adapter in it."""
    apart = {m for b in anatomy.blocks for m in (b.proj, b.fc2)}
    apart |= {n.removesuffix(".weight") for b in anatomy.blocks for n in b.qkv}
    inside = any(name.startswith(f"{b.name}.") for b in anatomy.blocks)
    return inside and name not in apart and isinstance(module, nn.Linear)


class _Watch:
    """A forward hook: picklable, silent while nothing is recorded."""

    def __init__(self, recorder: Recorder, name: str, head: bool = False) -> None:
        self.recorder, self.name, self.head = recorder, name, head

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.recorder.armed and torch.is_grad_enabled():
            self._read(module, args, output)  # pyright: ignore[reportCallIssue]

    @torch.compiler.disable
    def _read(self, module: nn.Module, args: Any, output: Any) -> None:
        if not any(p.requires_grad for p in module.parameters()):
            return
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self.recorder.forward(self.name, args[0], output, self.head)


class _Gradient:
    def __init__(self, recorder: Recorder, name: str, inputs: Tensor, head: bool) -> None:
        self.recorder, self.name, self.inputs, self.head = recorder, name, inputs, head

    def __call__(self, gradient: Tensor) -> None:
        self.recorder.backward(self.name, self.inputs, gradient, self.head)
