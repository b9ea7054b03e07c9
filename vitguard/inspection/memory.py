"""What a client remembers of the weights it accepted: a short random projection of each matrix."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitguard.errors import expected
from vitguard.inspection.signs import largest
from vitguard.inspection.verdict import Sign
from vitguard.vit import Anatomy

__all__ = ["FIRST_ROUND", "Memory", "Traces"]

FIRST_ROUND = "first round: there are no accepted weights to compare with"
_SIDE = 8
_VERSION = 1
_ROLES = ("patch", "attention", "mlp")

Traces = dict[str, Tensor]
"""Projection of each matrix to `_SIDE` x `_SIDE` numbers, by name."""


class Memory:
    """The last accepted weights as projections, and how far honest rounds moved them.

    The squared length of a matrix and of a difference is kept on average by the projection, with
    a relative deviation of about a fifth. It is drawn from a key of this client alone, so a server
    cannot look for weights that have the same one.
    """

    def __init__(self) -> None:
        self.key = secrets.randbits(62)
        self.rounds = 0
        self.last: Traces = {}
        self.farthest = 0.0
        """The largest move of an accepted round, relative as `compare` measures it."""

    def traces(self, weights: Mapping[str, Tensor], anatomy: Anatomy) -> Traces:
        """Return the projections of the matrices of the patch embedding and of the blocks.

        Not of the head: a fresh one moves by more than its size in an honest round.
        """
        return {
            n: _projected(t.detach(), self.key)
            for n, t in weights.items()
            if t.is_floating_point()
            and t.dim() >= 2
            and min(t.flatten(1).shape) >= _SIDE
            and anatomy.role(n) in _ROLES
        }

    def compare(self, traces: Traces) -> tuple[list[Sign], list[str]]:
        """Return the signs of weights that are far from the accepted ones, and what is missing."""
        if not self.last:
            return [], [FIRST_ROUND]
        moves = self.moves(traces)
        signs = largest("moved", moves.items())
        if self.rounds > 3 and self.farthest > 0:
            signs += largest("jumped", ((n, m / self.farthest) for n, m in moves.items()))
        return signs, []

    def moves(self, traces: Traces) -> dict[str, float]:
        """Return |new - last| over the longer of the two, by name; in [0, 2] up to projection."""
        both = {
            n: (new, self.last[n])
            for n, new in traces.items()
            if n in self.last and self.last[n].shape == new.shape
        }
        if not both:
            return {}
        new, old = (torch.stack(traces) for traces in zip(*both.values(), strict=True))
        lengths = torch.maximum(new.flatten(1).norm(dim=1), old.flatten(1).norm(dim=1))
        moves = (new - old).flatten(1).norm(dim=1) / lengths
        return dict(zip(both, moves.where(lengths != 0, 0.0).tolist(), strict=True))

    def accept(self, traces: Traces) -> None:
        """Remember weights that a client trained on."""
        moves = [m for m in self.moves(traces).values() if math.isfinite(m)]
        self.farthest = max([self.farthest, *moves])
        self.last, self.rounds = dict(traces), self.rounds + 1

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values that JSON holds: local, never to be sent."""
        last = {n: t.flatten().tolist() for n, t in self.last.items()}
        return {
            "version": _VERSION, "key": self.key, "rounds": self.rounds,
            "farthest": self.farthest, "last": last,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state left off.

        Raises:
            InputError: It is something else; nothing is changed.
        """
        try:
            if state["version"] != _VERSION:
                raise expected(f"a memory of version {_VERSION}", state["version"])
            if state.keys() != {"version", "key", "rounds", "farthest", "last"}:
                raise KeyError("fields")
            key, rounds, farthest = state["key"], state["rounds"], state["farthest"]
            whole = type(key) is int and type(rounds) is int and type(farthest) is float
            last = {
                str(n): torch.tensor(values, dtype=torch.float32).view(_SIDE, _SIDE)
                for n, values in state["last"].items()
            }
            sound = whole and 0 <= key < 2**62 and rounds >= 0 and 0 <= float(farthest) < math.inf
            if not sound or not all(bool(t.isfinite().all()) for t in last.values()):
                raise expected("finite values", "others")
        except (
            AttributeError, KeyError, OverflowError, TypeError, ValueError, RuntimeError
        ) as error:  # fmt: skip
            raise expected("what Memory.state_dict returned", repr(error)[:200]) from error
        self.key, self.rounds, self.farthest, self.last = key, rounds, float(farthest), last


def _projected(tensor: Tensor, key: int) -> Tensor:
    rows = tensor.flatten(1).float()
    left, right = (_signs(key, size).to(rows) for size in rows.shape)
    return (left @ rows @ right.T).cpu() / _SIDE


@functools.lru_cache(64)
def _signs(key: int, size: int) -> Tensor:
    """Return random signs, shape (`_SIDE`, size), each size from a stream of its own."""
    own = torch.Generator().manual_seed((key + size) % 2**62)
    return torch.randint(0, 2, (_SIDE, size), generator=own).float() * 2 - 1
