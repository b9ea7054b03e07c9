"""The private training loop's state: which batch is due, and the tape of its pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitguard.defenses._base import Installed
from vitguard.defenses.privacy.engine import Engine, Watch
from vitguard.defenses.privacy.tape import Tape
from vitguard.errors import Unprotected

__all__ = ["PrivateTraining", "paused"]


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Let passes through that are protected, and no part of the loop, such as Guard.update's."""
    live = [m for m in model.modules() if isinstance(m, PrivateTraining) and m.live]
    protection: Any = getattr(model, "vitguard", None)
    prepared = getattr(protection, "prepared", True)
    for training in live:
        training.live = False
    try:
        if not prepared:
            protection.prepared = True
        yield
    finally:
        if not prepared:
            protection.prepared = False
        for training in live:
            training.live = True


class PrivateTraining(Installed):
    """Watches the training passes of one model; a copy or pickle of the model is not watched.

    The loader announces each batch, the forward pass must be of that batch, and the optimizer
    takes its tape. Anything else raises.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.live = True
        self.due: tuple[int, int, bool] | None = None
        self.tape: Tape | None = None
        self._watch: Watch | None = None
        self._key: int | None = None
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        transient = {"live": False, "due": None, "tape": None, "_watch": None, "_key": None}
        return {**self.__dict__, **transient}

    def install(self, model: nn.Module) -> None:
        """Start watching `model`."""
        before = model.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True)
        after = model.register_forward_hook(self._end, with_kwargs=True, always_call=True)
        self._handles = [before, after]

    def uninstall(self, model: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.live = False

    def announce(self, size: int, real: int, *, last: bool = True, key: int | None = None) -> None:
        """Say what comes next.

        Args:
            size: Examples handed out; the first `real` of them count.
            last: Whether the step follows.
            key: Of the draw that the pieces of one batch share, for defenses that draw once for a
                whole batch.
        """
        self.due, self.tape, self._key = (size, real, last), None, key

    def take(self) -> tuple[Tape, int, bool]:
        """Return the pass of the announced batch, once."""
        if self.tape is None or self.due is None:
            raise Unprotected(
                "Expected one training pass between a batch of the private loader and the step, "
                "got none. Call model.train(), take batches from guard.prepare's loader and run "
                "loss.backward() before each step."
            )
        tape, (_, real, last) = self.tape, self.due
        self.tape = self.due = None
        return tape, real, last

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not (self.live and model.training and torch.is_grad_enabled()):
            return
        size = next((len(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), 0)
        if self.due is None or self.tape is not None or size != self.due[0]:
            due = (
                "none"
                if self.due is None
                else "one taken"
                if self.tape is not None
                else self.due[0]
            )
            raise Unprotected(
                f"Expected one training pass for each batch of the private loader, got a batch of "
                f"{size} where the batch due was {due}. Use the loader that guard.prepare returned."
            )
        for piece in model.modules():
            if isinstance(piece, Installed) and piece.one_draw():
                keys = None if self._key is None else torch.full((size,), self._key)
                piece.key_examples(keys)
        tape = self.engine.tape(model, size)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                tape.mark(tensor, True)
        self.tape = tape
        self._watch = Watch(tape)
        self._watch.__enter__()

    def _end(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        watch.__exit__(None, None, None)
        if output is not None and self.tape is not None:
            self.engine.verify(model, self.tape, output)
