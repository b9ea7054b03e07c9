"""One round of a client: a few steps on its own images, and the update that leaves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitguard as vg

__all__ = ["RATE", "STACK", "local_round"]

RATE = 0.05
STACK = "positions:kind=sincos+shuffle:ratio=0.7+noise:scale=10"
"""What this project protects its clients with."""


def local_round(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    defenses: str | list = STACK,
    generator: torch.Generator | None = None,
) -> vg.Update:
    """Train on the batches, one step each, and return what leaves; the model is trained in place.

    Args:
        batches: Images as the model takes them, and class indices.
        generator: Source of the defenses' draws, for tests only.
    """
    guard = vg.protect(model, defenses, generator=generator)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = guard.prepare(torch.optim.SGD(model.parameters(), lr=RATE))
    steps, size = 0, 1
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels) + guard.auxiliary_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps, size = steps + 1, len(images)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    update = vg.Update(
        moved, kind="difference", batch_size=size, local_steps=max(1, steps), learning_rate=RATE
    )
    return guard.seal(update)
