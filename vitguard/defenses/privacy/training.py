"""The private training loop's state: which batch is due, and the tape of its pass."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitguard import rounds
from vitguard.defenses.base import Installed
from vitguard.defenses.gradient_watch import Watched, unseen_gradient, watch_gradients
from vitguard.defenses.privacy.beside import refuse_stem, watch_heads
from vitguard.defenses.privacy.checks import refuse_checkpointing, refuse_half, refuse_sharded
from vitguard.defenses.privacy.divisor import CommonDivisor
from vitguard.defenses.privacy.engine import Engine, Watch
from vitguard.defenses.privacy.mixing import refuse_mixed_targets
from vitguard.defenses.privacy.tape import Tape
from vitguard.defenses.protection import Protection
from vitguard.defenses.steps import watch_steps
from vitguard.errors import Incompatible, InputError, Unprotected
from vitguard.vit import logits_of

__all__ = ["Due", "PrivateTraining", "paused"]

_REMEDY = (
    "Call loss.backward() and optimizer.step() after every batch: set physical_batch where memory "
    "is short, a smaller or larger batch_size in place of accumulation, and call loader.skip() "
    "for a batch that you do not want."
)

Probe = Callable[[nn.Module, Engine, tuple[Any, ...], dict[str, Any]], None]


class Due(NamedTuple):
    """What the next training pass must be of: one piece of a logical batch.

    Args:
        size: Examples handed out; the first `real` of them count.
        last: Whether the step follows this piece.
        piece: Which piece of its batch it is, from 0.
        batch: Which logical batch of this training it belongs to.
        rate: Chance that a record joined the batch, for the ledger.
    """

    size: int
    real: int
    last: bool = True
    piece: int = 0
    batch: int = 0
    rate: float = 1.0


def refuse_compiled() -> None:
    """Raise Incompatible under torch.compile, which would trace the record of one batch.

    While dynamo traces, looking at the stack makes it give up on the model's frame; the pass then
    runs as it is, below a frame of dynamo's.
    """
    line = (
        "Expected a model that is not compiled under differential privacy, got a training pass "
        "under torch.compile: each example's gradient is recorded as Python runs. Train the model "
        "itself; a copy may be compiled to evaluate it."
    )
    if torch.compiler.is_compiling():
        raise Incompatible(line)
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_qualname.startswith("_TorchDynamoContext.__call__"):
            raise Incompatible(line)
        frame = frame.f_back


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Let passes through that are protected, and no part of the loop, such as Guard.update's."""
    live = [t for t in _trainings(model) if t.live]
    protection = Protection.of(model)
    for training in live:
        training.live = False
    with nullcontext() if protection is None else protection.allowed():
        try:
            yield
        finally:
            for training in live:
                training.live = True


def _trainings(model: nn.Module) -> list[PrivateTraining]:
    """Return what watches a model, which need not be protected, or a part of it."""
    hooks = (h for m in model.modules() for h in m._forward_pre_hooks.values())
    owners = {id(o): o for h in hooks if (o := getattr(h, "__self__", None)) is not None}
    return [o for o in owners.values() if isinstance(o, PrivateTraining)]


class PrivateTraining(Installed):
    """Watches the training passes of one model; a copy or pickle of the model is not watched.

    The loader announces each batch, the forward pass must be of that batch, and the optimizer
    takes its tape. Anything else raises.

    Args:
        probe: Called before a pass: it refuses a model in which examples meet, once for each
            structure of the model.
    """

    def __init__(self, engine: Engine, probe: Probe) -> None:
        super().__init__()
        self.engine = engine
        self.probe = probe
        self.live = True
        self._open = False
        self.due: Due | None = None
        self.tape: Tape | None = None
        self._watch: Watch | None = None
        self._key: int | None = None
        self._batch = 0
        self._reader: object = None
        self.skipped = False
        """Whether the rest of the batch handed out last is not wanted."""
        self._divisor = CommonDivisor()
        self._told = False
        self._handles: list[Any] = []
        self._beside: Any = None
        self._watched = Watched()
        self.exposed = False
        """Whether a plain gradient reached a parameter since the weights were loaded."""
        self.loaded = False
        """Whether weights were loaded into the model since it was prepared, and not sent to it."""

    def __getstate__(self) -> dict[str, Any]:
        transient = dict.fromkeys(("due", "tape", "_watch", "_key", "_reader", "_beside"))
        return {
            **self.__dict__,
            **transient,
            "live": False,
            "_open": False,
        }

    def install(self, model: nn.Module) -> None:
        """Start watching `model`."""
        before = model.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True)
        after = model.register_forward_hook(self._end, with_kwargs=True, always_call=True)
        self._handles = [before, after]
        self._watch_all(model)
        watch_steps(self, model)
        self.live = True

    def uninstall(self, model: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._look_away()
        self._watched.end()
        self.live = False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Let the optimizer step in the block: it is the private one's."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def moving(self, model: nn.Module) -> None:
        # without either it trains on something that came from elsewhere, such as a server's average
        if self.live and not self._open and unseen_gradient(model, self._watched):
            self.exposed = True
        if self.due is not None or self.exposed:
            self.refuse_others()

    def refuse_others(self) -> None:
        """Raise Unprotected for a step that is not the private optimizer's."""
        if self.live and not self._open:
            raise Unprotected(
                "Expected a step of the private optimizer, got one of another optimizer of the "
                "model's parameters: it would be neither noised nor counted. Use the optimizer "
                "that guard.prepare returned."
            )

    def arrived(self) -> None:
        self.exposed = False
        self.loaded = self.loaded or rounds.current() is None

    def settle(self) -> None:
        if self.exposed:
            raise Unprotected(
                "Expected gradients of the private loop only, got a plain one (of a pass in eval "
                "mode, or around the model's own forward) since the weights were loaded. Evaluate "
                "under torch.no_grad() or on a copy, and load the weights again."
            )

    def _watch_all(self, model: nn.Module) -> None:
        """Note gradients of every parameter, of those too that came since: a head, adapters."""
        watch_gradients(model.parameters(), self._expose, self._watched)

    def _expose(self, gradient: Tensor) -> None:
        if self.live and not (self.engine.accumulates and self.tape is not None):
            self.exposed = True

    # the loader's side

    def open(self, reader: object) -> None:
        """Start a new pass over the loader: what an earlier one left unfinished is dropped."""
        self._reader = reader
        self.drop()

    def turn(self, reader: object) -> None:
        """Raise Unprotected unless `reader` may hand out its next batch now."""
        if not self._handles:
            raise Unprotected(
                "Expected the loader of the last guard.prepare, got one whose training was "
                "prepared again or removed. Use the loader that guard.prepare returned."
            )
        if reader is not self._reader:
            raise Unprotected(
                "Expected one iterator over the private loader at a time, got an older one after "
                "a newer was started: a record could count twice in a step. Use the newest."
            )
        if self.due is not None:
            raise Unprotected(
                "Expected a step on each batch of the private loader before the next is taken, "
                f"got the next batch asked for before the step on the last. {_REMEDY}"
            )

    def announce(
        self,
        size: int,
        real: int,
        *,
        piece: int = 0,
        last: bool = True,
        rate: float = 1.0,
        key: int | None = None,
    ) -> Due:
        """Say what comes next; see `Due`. A first piece begins a new logical batch.

        Args:
            key: Of the draw that the pieces of one batch share, for defenses that draw once for a
                whole batch.
        """
        self.drop()
        self.skipped = False
        self._batch += piece == 0
        self.due, self._key = Due(size, real, last, piece, self._batch, rate), key
        return self.due

    def drop(self) -> None:
        """Forget the batch that is due; a backward pass of it raises from now on."""
        if self.tape is not None:
            self.tape.close()
        self._look_away()
        self.due = self.tape = None
        self.skipped = True

    def _look_away(self) -> None:
        """Let modules beside the model be called as they like, until the next pass."""
        if self._beside is not None:
            self._beside.remove()
            self._beside = None

    # the optimizer's side

    def take(self) -> tuple[Tape, Due]:
        """Return the pass of the announced batch, once."""
        if not self._handles:
            raise Unprotected(
                "Expected the optimizer of the last guard.prepare, got one whose training was "
                "prepared again or removed. Put all that is trained into one optimizer, in groups, "
                "and step the one that guard.prepare returned last."
            )
        if self.tape is None or self.due is None:
            raise Unprotected(
                "Expected one training pass between a batch of the private loader and the step, "
                "got none. Call model.train(), take batches from guard.prepare's loader and run "
                "loss.backward() before each step."
            )
        taken = self.tape, self.due
        self._look_away()
        self.tape = self.due = None
        return taken

    # the model's side

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not (self.live and torch.is_grad_enabled()):
            return
        if not model.training:
            return self._watch_all(model)
        refuse_compiled()
        refuse_sharded(model)
        refuse_checkpointing(model)
        refuse_half(model)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._check_due(tensors)
        refuse_stem(tensors)
        self.engine.close()
        self._tell_of_hooks(model)
        self.probe(model, self.engine, args, kwargs)
        assert self.due is not None
        size = self.due.size
        for piece in model.modules():
            if isinstance(piece, Installed) and piece.one_draw():
                keys = None if self._key is None else torch.full((size,), self._key)
                piece.key_examples(keys)
        tape = self.engine.tape(model, size)
        for tensor in tensors:
            tape.mark(tensor, True)
        self.tape = tape
        self._watch = Watch(tape)
        self._watch.__enter__()

    def _tell_of_hooks(self, model: nn.Module) -> None:
        """Warn of somebody's hooks on parameters, which a private gradient does not pass.

        Looked for at the first pass.
        """
        if self._told:
            return
        self._told = True
        protection = Protection.of(model)
        watched = [self._watched] if protection is None else [self._watched, protection.watched]
        for name, p in model.named_parameters():
            own = sum(p in known for known in watched)
            after = p._post_accumulate_grad_hooks  # type: ignore[attr-defined]
            if p.requires_grad and (after or len(p._backward_hooks or ()) > own):
                warnings.warn(
                    f"Expected parameters without hooks of their own under differential privacy, "
                    f"got one on {name}: a private gradient does not pass it. Freeze what is not "
                    "to move, mask weights in the forward pass (torch.nn.utils.prune), and read "
                    "gradients from parameter.grad after the step.",
                    stacklevel=2,
                )
                return

    def _check_due(self, tensors: list[Tensor]) -> None:
        size = next((len(t) for t in tensors if t.dim()), 0)
        if self.due is None:
            raise Unprotected(
                f"Expected one training pass for each batch of the private loader, got one of "
                f"{size} examples without a batch of it. Use the loader that guard.prepare "
                "returned, and torch.no_grad() where nothing is trained."
            )
        if self.tape is not None:
            raise Unprotected(
                "Expected one training pass for each batch of the private loader, got a second one "
                "of the same batch (a second view, a teacher): an example would be clipped in two "
                "parts. Train on one view a batch, and run a pass that is not trained under "
                "torch.no_grad()."
            )
        if size != self.due.size:
            raise Unprotected(
                f"Expected one training pass of the {self.due.size} examples that the private "
                f"loader handed out, got {size}. Pass its batch on as it is: neither cut, nor "
                "joined with other images or views."
            )
        marks = (getattr(t, "_vitguard_batch", None) for t in tensors)
        if any(mark is not None and mark != self.due for mark in marks):
            raise Unprotected(
                "Expected a training pass of the batch that the private loader handed out last, "
                f"got an earlier batch. {_REMEDY}"
            )

    def _end(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        watch.__exit__(None, None, None)
        tape = self.tape
        self.tape = None  # a pass that broke off or is refused may be run again
        if output is not None and tape is not None:
            self.engine.verify(model, tape, output)
            self._watch_criterion(output)
            self._look_away()
            self._beside = watch_heads(model, output, tape)
            self.tape = tape

    def _watch_criterion(self, output: Any) -> None:
        """Look, in the backward pass, at the gradient of class scores."""
        try:
            scores = logits_of(output)
        except InputError:
            return  # no classes, or known to the training script alone
        if scores.requires_grad:
            for look in (refuse_mixed_targets, self._divisor.refuse):
                scores.register_hook(functools.partial(look, scores.detach()))
