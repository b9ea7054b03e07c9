"""What a protected model carries with it: its defenses, their pieces, draws and ledgers."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitguard import rounds
from vitguard.defenses.base import (
    Defense,
    Draws,
    Installed,
    Ledgered,
    StepDefense,
    UpdateDefense,
)
from vitguard.defenses.feedback import Feedback
from vitguard.defenses.gate import LeakGate, Tally
from vitguard.defenses.gradient_watch import Watched, unseen_gradient, watch_gradients
from vitguard.defenses.steps import watch_steps
from vitguard.errors import Unprotected
from vitguard.inspection import Memory
from vitguard.vit import Anatomy, canonical_name

__all__ = ["Protection"]

_BLOCKS = threading.Lock()


class Protection(nn.Module):
    """What lives at `model.vitguard`: the settings, and a child for each model defense."""

    def __init__(self, anatomy: Anatomy, defenses: tuple[Defense, ...], draws: Draws) -> None:
        super().__init__()
        self.anatomy = anatomy
        self.defenses = defenses
        self.draws = draws
        self.prepared = False
        """Whether training passes are protected by `Guard.prepare`, or need not be."""
        self.allowing = 0
        """How many blocks of `allowed` are open, of all threads together."""
        self.watch: Any = None
        """The hook that tells of training before `prepare`, where the stack protects each step."""
        self.watched = Watched()
        """The parameters whose gradients are noted."""
        self.loading: Any = None
        """The hook that tells which weights a state dict brings."""
        self.whole = False
        """Whether the last state dict brought everything that is trained and sent."""
        self.exposed = False
        """Whether a plain gradient reached a parameter before `prepare`, since the last load."""
        self.destination: Literal["", "warned", "sealed", "local"] = ""
        """What was said of the update that training ends in: sealed and sent, or kept."""
        self.begun = 0
        """How many private steps were counted when `will_seal` said that training begins."""
        self.rehearsal = False
        """Whether optimizer steps are those of `Guard.update`, or of a model that nobody sends."""
        self.taken: Iterable[nn.Parameter] = ()
        """Parameters that the defenses took out of the model and something still holds."""
        self.brought: set[str] = set()
        """What the last state dict held of the defenses' own tensors."""
        self.ungating = 0
        """How many blocks of `ungated` are open, of all threads together."""
        self.tally = Tally()
        """What a gate decided of the updates of this process."""
        self.memory = Memory()
        """What the client remembers of the weights that it accepted."""
        self.feedback = Feedback()
        """What defenses cut from the last update, for the next one; copies begin without."""
        self.ledgers = {d.name: d.ledger() for d in defenses if isinstance(d, Ledgered)}
        """What each defense with a guarantee has spent, by its name; copies go on from it."""
        self.copied: dict[str, int] = {}
        """How many releases the ledgers had when this copy was made, by name; empty for no copy."""
        self.register_load_state_dict_pre_hook(_tolerate_original)
        self.register_load_state_dict_post_hook(_restored)

    def __repr__(self) -> str:
        return f"Protection({', '.join(map(repr, self.defenses))})"

    def __getstate__(self) -> dict[str, Any]:
        # a copy has no private optimizer of its own, and nobody's optimizer holds what was taken;
        # parameters of a copy have no hooks (`watch_again`), and no audit is inside of it
        copied = {name: getattr(kept, "steps", -1) for name, kept in self.ledgers.items()}
        fresh = {"prepared": False, "taken": (), "copied": copied}
        return {**self.__dict__, **fresh, "allowing": 0, "ungating": 0}

    @staticmethod
    def of(model: nn.Module) -> Protection | None:
        """Return the protection of a model, None where there is none."""
        found = getattr(model, "vitguard", None)
        return found if isinstance(found, Protection) else None

    @property
    def step(self) -> StepDefense | None:
        """The defense of the step, where the stack has one."""
        return next((d for d in self.defenses if isinstance(d, StepDefense)), None)

    @contextmanager
    def counted(self, defenses: Sequence[Defense]) -> Iterator[None]:
        """Count what the block makes before it leaves; what cannot be afforded is not made."""
        ledgered = [d for d in defenses if isinstance(d, Ledgered)]
        for defense in ledgered:
            defense.admit(self.ledgers[defense.name])
        yield
        for defense in ledgered:  # refuses once more: another thread may have spent the rest
            defense.record(self.ledgers[defense.name], void=self.draws.void)

    def auxiliary_loss(self, model: nn.Module) -> Tensor:
        """Return the sum of the pieces' losses of the last training forward of `model`."""
        losses = [piece.auxiliary_loss() for piece in self.installed()]
        total = next(model.parameters()).new_zeros(())
        return sum((x for x in losses if x is not None), start=total)

    def watch_training(self, model: nn.Module) -> None:
        """Refuse training passes that nothing prepared, and note gradients around the model."""
        self.watch = model.register_forward_pre_hook(_require_preparation)
        self.watch_again(model)

    def watch_again(self, model: nn.Module) -> None:
        """Note gradients of parameters that came later too: of a copy, a new head, adapters."""
        if self.watch is not None and not self.passing:
            watch_gradients(model.parameters(), self._expose, self.watched)
            watch_steps(self, model)

    def _expose(self, gradient: Tensor) -> None:
        if not self.passing:
            self.exposed = True

    def watch_loading(self, model: nn.Module) -> None:
        """Note whether a state dict brings all weights: what was done to these is gone then."""
        self.loading = model.register_load_state_dict_pre_hook(_arriving)

    def unwatch(self) -> None:
        """Let every training pass through, unnoticed."""
        if self.loading is not None:
            self.loading.remove()
            self.loading = None
        if self.watch is not None:
            self.watch.remove()
            self.watch = None
        self.watched.end()

    def idle(self) -> str:
        """Return the line that says which defenses training does not set off, "" where all is well.

        Defenses of the update act in `Guard.update` and `Guard.seal` alone.
        """
        acting = [d.name for d in self.defenses if isinstance(d, UpdateDefense | LeakGate)]
        if not acting or self.destination in ("sealed", "local") or rounds.current() is not None:
            return ""
        return (
            "Expected training whose update guard.seal sends, got training that says nothing of "
            f"it: {', '.join(acting)} would not act on the weights. Train inside guard.round(...) "
            "or call guard.will_seal(), and seal the difference; where no update leaves this "
            "machine call guard.keep_local(), or leave these defenses out."
        )

    def watch_sending(self, model: nn.Module) -> None:
        """Warn at the first optimizer step of `model` where `idle` has something to say."""
        if self.idle():
            watch_steps(self, model)

    def moving(self, model: nn.Module) -> None:
        """Refuse a step on plain gradients, which nobody prepared: of a pass in eval mode, say."""
        if self.passing:
            return
        if self.watch is not None and unseen_gradient(model, self.watched):
            self.exposed = True
        if self.exposed:
            raise Unprotected(
                "Expected training through guard.prepare(optimizer, loader), got an optimizer's "
                "step after a plain gradient (of a pass in eval mode, or around the model's own "
                "forward): it would be neither clipped nor noised. Call prepare, in training mode, "
                "or take the gradient on a copy."
            )

    def stepped(self) -> None:
        """Note that an optimizer is about to step the model."""
        if not (self.destination or self.rehearsal or self.allowing) and (line := self.idle()):
            self.destination = "warned"
            warnings.warn(line, stacklevel=2)

    def left_out(self, trained: set[int], needed: int) -> bool:
        """Whether an optimizer that leaves out what a defense added is refused here: pieces do."""
        return False

    @property
    def passing(self) -> bool:
        """Whether a training pass is let through: after `prepare`, or inside `allowed`."""
        return self.prepared or self.allowing > 0

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Let passes through that are protected in another way, such as those of Guard.update.

        Counted, not put back: of threads that meet here the last one out closes it.
        """
        with _BLOCKS:
            self.allowing += 1
        try:
            yield
        finally:
            with _BLOCKS:
                self.allowing -= 1

    @contextmanager
    def ungated(self) -> Iterator[None]:
        """Let updates pass a gate unseen: inside an audit, whose attacks judge them."""
        with _BLOCKS:
            self.ungating += 1
        try:
            yield
        finally:
            with _BLOCKS:
                self.ungating -= 1

    def installed(self) -> list[Installed]:
        """Return the installed pieces, in order."""
        return [m for m in self.children() if isinstance(m, Installed)]

    def holds(self, name: str) -> bool:
        """Whether a piece keeps a tensor of the base model from leaving."""
        return any(piece.holds(name) is not None for piece in self.installed())

    def uninstall(self, model: nn.Module) -> None:
        """Undo the pieces in reverse order."""
        for piece in reversed(self.installed()):
            piece.uninstall(model)
        self.unwatch()


def _require_preparation(model: nn.Module, args: Any) -> None:
    """Refuse a plain training pass where the stack protects each example's gradient."""
    protection = model.get_submodule("vitguard")
    assert isinstance(protection, Protection)
    if not torch.is_grad_enabled() or protection.passing:
        return
    protection.watch_again(model)
    if model.training:
        raise Unprotected(
            "Expected training through guard.prepare(optimizer, loader), got a training pass "
            "without it: its gradient would be plain. Call prepare, or use guard.update."
        )


def _arriving(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Note whether a state dict holds every weight that is trained and leaves."""
    protection = model.get_submodule("vitguard")
    assert isinstance(protection, Protection)
    wanted = {
        f"{prefix}{name}": p.shape
        for name, p in model.named_parameters()
        if p.requires_grad
        and not name.startswith("vitguard.")
        and not protection.holds(canonical_name(name))
    }
    protection.whole = all(
        isinstance(t := state.get(name), Tensor) and t.shape == shape
        for name, shape in wanted.items()
    )


def _tolerate_original(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a strict load take a checkpoint that knows nothing of vitguard."""
    protection = module
    assert isinstance(protection, Protection)
    protection.brought = {k.removeprefix(prefix) for k in state if k.startswith(prefix)}
    if not protection.brought:
        state.update({f"{prefix}{k}": v for k, v in module.state_dict().items()})


def _restored(module: nn.Module, incompatible_keys: Any) -> None:
    """Note which lost values a state dict of a protected model has brought back."""
    assert isinstance(module, Protection)
    if module.whole:
        module.whole = module.exposed = False  # what was done to the weights will not be sent
        for piece in module.installed():
            piece.arrived()
    for name, piece in module.named_children():
        if isinstance(piece, Installed):
            piece.lost = frozenset(n for n in piece.lost if f"{name}.{n}" not in module.brought)
