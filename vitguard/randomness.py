"""The generators that belong to the whole process: seeded for a moment, then put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["draws_globally", "seeded"]

_LOCK = threading.RLock()


@contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[list[torch.Generator]]:
    """Seed what dropout and drop path of `model` draw from; its state before comes back afterwards.

    One thread at a time is inside. Yields the generators: the CPU's, and those of the CUDA devices
    that hold the model.
    """
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[index] for index in sorted(devices)]
    with _LOCK:
        before = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(seed)
            yield generators
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)


def draws_globally(model: nn.Module, images: Tensor) -> bool:
    """Whether a pass of `model` over `images`, in its present mode, draws numbers that no argument
    gives: dropout, drop path, a functional dropout in attention.
    """
    with seeded(0, model) as generators, torch.no_grad():
        before = [generator.get_state() for generator in generators]
        model(images)
        return any(
            not torch.equal(generator.get_state(), state)
            for generator, state in zip(generators, before, strict=True)
        )
