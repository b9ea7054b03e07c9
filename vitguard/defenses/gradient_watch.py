"""Gradients of parameters that a defense must know of, however they are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Watched", "unseen_gradient", "watch_gradients"]


class Watched:
    """Parameters whose gradients are noted. Copies and pickles are empty.

    By id and hook: a weak reference would keep torch from swapping a parameter (`model.to`).
    """

    def __init__(self) -> None:
        self._handles: dict[int, Any] = {}

    def __reduce__(self) -> Any:
        return (type(self), ())

    def __contains__(self, parameter: Tensor) -> bool:
        handle = self._handles.get(id(parameter))
        return handle is not None and handle.id in (parameter._backward_hooks or ())

    def add(self, parameter: Tensor, note: Callable[[Tensor], None]) -> None:
        """Call `note` with each gradient of a parameter from now on."""
        self._handles[id(parameter)] = parameter.register_hook(note)

    def end(self) -> None:
        """Note no more."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


def watch_gradients(
    parameters: Iterable[Tensor], note: Callable[[Tensor], None], watched: Watched
) -> None:
    """Call `note` when a gradient of a parameter is taken, also of one that is unfrozen later.

    By `backward` or by `torch.autograd.grad`, which leaves nothing in the parameter itself. At once
    for one that a transform of `torch.func` put in its place, which takes no hook.

    Args:
        note: It returns nothing: the gradient stays as it is.
        watched: Takes them in; what is in it already stays as it is.
    """
    for parameter in parameters:
        if parameter in watched:
            continue
        if torch._C._functorch.is_gradtrackingtensor(parameter):  # type: ignore[attr-defined]
            note(parameter)
        elif not parameter.is_leaf:
            if parameter.requires_grad:
                watched.add(parameter, note)
        elif parameter.is_floating_point() or parameter.is_complex():
            trained = parameter.requires_grad
            parameter.requires_grad_(True)  # torch takes no hook for one that is frozen
            watched.add(parameter, note)
            parameter.requires_grad_(trained)


def unseen_gradient(model: nn.Module, watched: Watched) -> bool:
    """Whether a parameter that nobody watched, since it came later, has a gradient."""
    return any(p.grad is not None and p not in watched for p in model.parameters())
