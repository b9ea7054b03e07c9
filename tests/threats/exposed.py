"""What a server sees of a client that loads the weights it was handed and trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vitguard.core import Normalization, View
from vitguard.guard import protect
from vitguard.registry import parse_stack
from vitguard.threats import CuriousServer, MaliciousServer

PLAIN = Normalization()


def exposed(
    model: nn.Module, pixels: Tensor, threat: CuriousServer | MaliciousServer,
    defenses: str = "none", **how: Any,
) -> View:  # fmt: skip
    """Return the view of one update of `pixels` with labels 0, 1, 2 ..., under the defenses."""
    secret = torch.Generator().manual_seed(1)
    guard = protect(copy.deepcopy(model).train(), parse_stack(defenses), generator=secret)
    guard.model.load_state_dict({**guard.model.state_dict(), **(threat.hand_out(guard) or {})})
    with guard.rewound():
        update = guard.update(PLAIN.apply(pixels), torch.arange(len(pixels)) % 10, **how)
    return threat.view(guard, update, PLAIN)
