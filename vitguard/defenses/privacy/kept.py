"""A model's state, kept while it is tried out, and put back."""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitguard.randomness import seeded

__all__ = ["Kept", "differing", "same_draws"]


_CONTAINERS = (list, dict, set, OrderedDict)


class Kept:
    """What passes over a model may change: tensors, gradients, plain attributes, modes, hooks.

    Lists, dicts and sets among the attributes are kept one level deep. Hooks are such: a library
    that registers some in the first pass, and notes it in an attribute, would do so in each.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [
            (m, dict(m.__dict__), dict(m._buffers), dict(m._modules)) for m in model.modules()
        ]
        attributes = [v for m in model.modules() for v in m.__dict__.values()]
        plain = [v for v in attributes if isinstance(v, Tensor) and not v.requires_grad]
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers(), *plain)}
        self._tensors = [(t, t.detach().clone()) for t in tensors.values()]
        self._containers = [(v, v.copy()) for v in attributes if type(v) in _CONTAINERS]
        self._generators = [
            (v, v.get_state()) for v in attributes if isinstance(v, torch.Generator)
        ]
        self._gradients = [(p, p.grad) for p in model.parameters()]

    def restore(self) -> None:
        """Put everything back, but for gradients, which are cleared."""
        for module, attributes, buffers, children in self._modules:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
            for own, before in ((module._buffers, buffers), (module._modules, children)):
                if own != before or list(own) != list(before):
                    own.clear()
                    own.update(before)  # type: ignore[arg-type]
        with torch.no_grad():
            for tensor, before in self._tensors:
                if tensor.shape == before.shape:
                    tensor.copy_(before)
                else:
                    tensor.set_(before.clone())  # type: ignore[arg-type]
        for value, before in self._containers:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        for generator, state in self._generators:
            generator.set_state(state)
        for p, _ in self._gradients:
            p.grad = None

    def give_back(self) -> None:
        """Put everything back, gradients too."""
        self.restore()
        for p, gradient in self._gradients:
            p.grad = gradient

    def changed(self) -> dict[str, Tensor]:
        """Return every buffer as it is now, and the parameters that a pass changed, by name."""
        before = {id(t): b for t, b in self._tensors}
        state = {n: b.detach().clone() for n, b in self._model.named_buffers()}
        for name, p in self._model.named_parameters():
            if not _equal(p.detach(), before[id(p)]):
                state[name] = p.detach().clone()
        return state


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """Return the name of a tensor that differs between two `changed` states, if any."""
    for name in (*one, *other.keys() - one.keys()):
        if name not in one or name not in other or not _equal(one[name], other[name]):
            return name
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    same = a == b
    if a.is_floating_point():
        same = same | (a.isnan() & b.isnan())
    return bool(same.all())


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Draw the same numbers in every such block; the state of all generators stays. No warnings."""
    legacy = np.random.mtrand  # what layers that call numpy.random draw from
    states: tuple[Any, Any] = random.getstate(), legacy.get_state()
    try:
        with warnings.catch_warnings(), seeded(0, model):
            warnings.simplefilter("ignore")
            random.seed(0)
            legacy.seed(0)
            yield
    finally:
        random.setstate(states[0])
        legacy.set_state(states[1])
