"""Keeping a long matching run in a file, so that a killed one goes on to the same end."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vitguard.attacks.matching.restart import Restart
from vitguard.errors import expected
from vitguard.files import write_atomically

__all__ = ["load_run", "save_run"]


def save_run(
    path: str | Path, identity: dict[str, Any], restarts: Sequence[Restart], done: int
) -> None:
    """Write the state of every restart after `done` iterations; atomic, for its owner alone.

    It holds what the attack made of private images so far.
    """
    buffer = io.BytesIO()
    state = {"identity": identity, "done": done, "restarts": [r.state() for r in restarts]}
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue(), private=True)


def load_run(path: str | Path, identity: dict[str, Any], restarts: Sequence[Restart]) -> int:
    """Continue from `path` if it exists, and return how many iterations are done.

    Raises:
        InputError: The file is no saved run, or one of another attack, seed, setting or update.
    """
    if not Path(path).exists():
        return 0
    afresh = "Give another file to start afresh."
    try:
        state = torch.load(path, weights_only=True)
        saved, parts, done = dict(state["identity"]), state["restarts"], int(state["done"])
    except Exception as error:  # torch raises whatever it likes on a file of another kind
        raise expected("a saved run", f"{path} ({type(error).__name__})", afresh) from error
    different = [k for k in identity if saved.get(k) != identity[k]]
    if different:
        raise expected(
            f"the saved run of this attack at {path}",
            f"one with another {', '.join(different)}",
            afresh,
        )
    for restart, part in zip(restarts, parts, strict=True):
        restart.load(part)
    return done
