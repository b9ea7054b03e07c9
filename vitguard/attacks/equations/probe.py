"""What enters and leaves modules of the attacked model when a test image goes through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitguard.attacks.budget import charge_update
from vitguard.core import View
from vitguard.errors import NotApplicable

__all__ = ["probe"]


def probe(view: View, *, entering: Sequence[str] = (), leaving: Sequence[str] = ()) -> list[Tensor]:
    """Return the first input of some modules, then the output of others, for one smooth image.

    Args:
        view: Whose model is run, once.
        entering: Names of modules whose first input is returned.
        leaving: Names of modules whose output is returned; of several outputs the first.

    Raises:
        NotApplicable: The model does not call one of the modules, or not with a tensor.
    """
    model, seen = view.model, {}

    def keep(key: tuple[str, str]) -> Callable[..., None]:
        def hook(_module: object, given: tuple, made: object = None) -> None:
            value = given if key[0] == "entering" else made
            seen[key] = value[0] if isinstance(value, tuple) and value else value

        return hook

    ends = [("entering", name) for name in entering] + [("leaving", name) for name in leaving]
    parameter = next(model.parameters())
    image = torch.linspace(-1, 1, math.prod(view.image_shape)).reshape(1, *view.image_shape)
    hooks = []
    try:
        for end, name in ends:
            module = model.get_submodule(name)
            before = end == "entering"
            add = module.register_forward_pre_hook if before else module.register_forward_hook
            hooks.append(add(keep((end, name))))
        with torch.no_grad():
            model(image.to(parameter))
    finally:
        for hook in hooks:
            hook.remove()
    charge_update(view, times=0.3, images=1)
    for end, name in ends:
        if not isinstance(seen.get((end, name)), Tensor):
            raise NotApplicable(f"the model does not pass a tensor through {name}")
    return [seen[end] for end in ends]
