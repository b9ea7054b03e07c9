"""What a client remembers of the weights it accepted: a short random projection of each matrix."""

from __future__ import annotations

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
        signs = _Signs(self.key)
        return {
            n: signs.project(t.detach())
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
        found = {}
        for name, new in traces.items():
            old = self.last.get(name)
            if old is not None and old.shape == new.shape:
                longer = max(float(new.norm()), float(old.norm()))
                found[name] = float((new - old).norm()) / longer if longer else 0.0
        return found

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


class _Signs:
    """Random signs by size, from a key."""

    def __init__(self, key: int) -> None:
        self.generator = torch.Generator().manual_seed(key)
        self.made: dict[int, Tensor] = {}

    def project(self, tensor: Tensor) -> Tensor:
        rows = tensor.flatten(1).float()
        left, right = (self._of(size).to(rows) for size in rows.shape)
        return (left @ rows @ right.T).cpu() / _SIDE

    def _of(self, size: int) -> Tensor:
        if size not in self.made:
            # each size from its own stream, whatever was asked before
            own = torch.Generator().manual_seed((self.generator.initial_seed() + size) % 2**62)
            self.made[size] = torch.randint(0, 2, (_SIDE, size), generator=own).float() * 2 - 1
        return self.made[size]
