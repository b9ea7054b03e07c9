"""What a guard saves and takes up again: ledgers, accepted weights, residuals, draws of a test."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vitguard.defenses.base import UpdateDefense
from vitguard.defenses.feedback import Feedback
from vitguard.defenses.protection import Protection
from vitguard.errors import expected
from vitguard.files import parsed_json
from vitguard.inspection import Memory

__all__ = ["from_bytes", "load_state", "state_of", "to_bytes"]


def state_of(protection: Protection) -> dict[str, Any]:
    """Return what a protected model has spent, and the draws of a generator given to it."""
    state: dict[str, Any] = {"version": 2}
    state["ledger"] = {name: ledger.state_dict() for name, ledger in protection.ledgers.items()}
    if protection.memory.rounds:
        state["inspection"] = protection.memory.state_dict()
    if protection.feedback:
        state["residuals"] = protection.feedback.state_dict()
    if protection.draws.seeded is not None:
        state["draws"] = protection.draws.seeded.get_state()
    return state


def to_bytes(state: Mapping[str, Any], *, draws: bool, memory: bool) -> bytes:
    """Return the state as JSON; without both the ledgers alone, which hold no secret."""
    state = dict(state)
    if not memory:
        state.pop("inspection", None)
    generator = state.pop("draws", None)
    if draws and generator is not None:
        state["draws"] = generator.numpy().tobytes().hex()
    if residuals := state.pop("residuals", None):
        if not draws:
            raise expected(
                "a state without secrets", f"residuals of {', '.join(residuals)}",
                "This place keeps no secret: leave feedback out, or keep Guard.state_dict().",
            )  # fmt: skip
        state["residuals"] = {
            name: {**value, "tensors": save(_plain(value["tensors"])).hex()}
            for name, value in residuals.items()
        }
    try:
        return json.dumps(state, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise expected("ledgers that JSON can hold", str(error)) from error


def from_bytes(data: bytes) -> dict[str, Any]:
    """Return the state that `to_bytes` wrote, or raise InputError."""
    try:
        state = dict(parsed_json(data))
        if "draws" in state:
            raw = bytearray.fromhex(state["draws"])
            state["draws"] = torch.frombuffer(raw, dtype=torch.uint8)
        if "residuals" in state:
            state["residuals"] = {
                name: {**value, "tensors": load(bytes.fromhex(value["tensors"]))}
                for name, value in state["residuals"].items()
            }
    except (TypeError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise expected("bytes from Guard.state_bytes", type(error).__name__) from error
    return state


def load_state(protection: Protection, state: Mapping[str, Any]) -> None:
    """Join what a state has spent to the ledgers; a state that is refused changes nothing.

    Raises:
        InputError: The state is something else, of another stack, or older than the ledger.
    """
    try:
        spent = dict(state["ledger"] or {})
    except (KeyError, TypeError, ValueError) as error:
        raise expected("a state from Guard.state_dict", repr(error)) from error
    if strangers := sorted(spent.keys() - protection.ledgers.keys()):
        raise expected(
            "a ledger of this stack's defenses", strangers[0], "Protect with it, as before."
        )
    if missing := sorted(protection.ledgers.keys() - spent.keys()):
        raise expected(
            f"the ledger of {missing[0]} in a state of this stack", "a state of another stack",
            "What was spent before would not count. Load the state that this stack saved.",
        )  # fmt: skip
    for name, ledger in spent.items():
        copy.deepcopy(protection.ledgers[name]).load_state_dict(ledger)
    if "inspection" in state:
        Memory().load_state_dict(state["inspection"])
    if residuals := state.get("residuals"):
        _check_residuals(protection, residuals)
    if protection.draws.seeded is not None and "draws" in state:
        try:
            protection.draws.seeded.set_state(state["draws"])
        except (TypeError, RuntimeError) as error:
            raise expected("a state from Guard.state_dict", repr(error)) from error
    for name, ledger in spent.items():
        protection.ledgers[name].load_state_dict(ledger)
    if "inspection" in state:
        protection.memory.load_state_dict(state["inspection"])
    protection.feedback.load_state_dict(residuals or {})


def _check_residuals(protection: Protection, residuals: Mapping[str, Any]) -> None:
    """Raise InputError unless a feedback of this stack can take these residuals."""
    Feedback().load_state_dict(residuals)
    known = {d.name for d in protection.defenses if isinstance(d, UpdateDefense) and d.feeds_back()}
    if strangers := sorted(residuals.keys() - known):
        raise expected(
            "residuals of this stack's defenses", strangers[0], "Protect with it, as before."
        )


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
