"""Opacus's optimizer with the book-keeping engine in place of per-sample gradients.

This file imports opacus; it is loaded by `DifferentialPrivacy.prepare` only.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from vitguard import rounds
from vitguard.defenses.base import Draws
from vitguard.defenses.privacy.accounting import Ledger
from vitguard.defenses.privacy.clipping import Clipping
from vitguard.defenses.privacy.engine import clipped_sum
from vitguard.defenses.privacy.samplers import place
from vitguard.defenses.privacy.tape import Tape
from vitguard.defenses.privacy.training import Due, PrivateTraining
from vitguard.errors import Incompatible, Unprotected, expected

__all__ = ["BookKeepingOptimizer", "refuse_optimizer"]

Spend = Callable[[float, float], None]
_LEDGER = "vitguard"  # the ledger's place in the optimizer's state


class BookKeepingOptimizer(DPOptimizer):
    """A private step: clip, write the release down, add noise, move the parameters, in this order.

    `noise_multiplier`, `max_grad_norm` and the announced sampling rate are read once for a batch
    (clip and rate at its first piece) and used for both the ledger and the noise, so schedules
    that change them are honoured and counted.

    Of several processes each clips its own examples. The sums meet on the first one, which adds one
    draw of noise to the whole sum and sends the result.

    Args:
        spend: Writes noise multiplier and rate of a release into `ledger`, or raises Unprotected.
        clipping: As `DifferentialPrivacy` has it.
        settings: Opacus's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        training: PrivateTraining,
        *,
        draws: Draws,
        ledger: Ledger,
        spend: Spend,
        clipping: Clipping = "flat",
        **settings: Any,
    ) -> None:
        super().__init__(optimizer, **settings)
        self._clipping: Clipping = clipping
        self._training, self._draws, self._spend, self._ledger = training, draws, spend, ledger
        self._names = {p: n for n, p in model.named_parameters()}
        self._place = place()
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._next: tuple[int, int] | None = None  # batch and piece that would continue the sums
        self._clip = self._rate = 0.0  # of the batch in the sums
        self._rates: list[float] = []  # of the groups, at the first piece of it
        self.left_out = 0
        """Examples so far whose gradient was not finite; for this machine alone."""
        self._handle = optimizer.register_step_pre_hook(lambda *_: training.refuse_others())

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise: a copy would step the original's model, and torch patches its class for it."""
        raise Incompatible(
            "Expected a private optimizer to stay as it is, got a copy or pickle of it: steps of "
            "both would go by one loader. Copy the model, call guard.prepare of Guard.of(copy) "
            "with an optimizer of the copy, and give it state_dict(), which holds the ledger too."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, and the ledger: tools that save optimizers save both.

        The ledger holds no secret.
        """
        return {**self.original_optimizer.state_dict(), _LEDGER: self._ledger.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a `state_dict` left off; the ledger never goes back.

        Raises:
            InputError: The state has no ledger, or an older one; nothing is loaded.
        """
        state = dict(state_dict)
        if _LEDGER not in state:
            raise expected(
                "the state of a private optimizer", "one without a ledger",
                "What was spent before would not count. Load weights alone, or a state that the "
                "private optimizer saved.",
            )  # fmt: skip
        self._ledger.load_state_dict(state.pop(_LEDGER))
        self.original_optimizer.load_state_dict(state)

    @property
    def accumulated_iterations(self) -> int:
        """Opacus divides by it; pieces of one batch are one iteration here."""
        return 1

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by `GradScaler.step`, before it does anything else."""
        raise Incompatible(
            "Expected private steps without a GradScaler, got one that is enabled: its scale would "
            "change what is clipped. Call loss.backward() and optimizer.step(); bfloat16 autocast "
            "needs no scaler."
        )

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Raise: Opacus's BatchMemoryManager cuts batches in a way that the loader does not see."""
        raise Incompatible(
            "Expected pieces of a batch from the private loader, got Opacus's signal_skip_step. "
            "Set physical_batch in DifferentialPrivacy."
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients: to None always, so that one made around the clipping shows.

        The sums of the pieces of an unfinished batch stay, until a new batch begins.
        """
        self.original_optimizer.zero_grad(True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the step on the batch that the loader handed out last; noise goes on its last piece.

        Returns:
            What `closure` returned, None without one.

        Raises:
            Unprotected: Something would leave without clipping, noise or its entry in the ledger;
                the parameters are unchanged.
        """
        self._refuse_rehearsed()
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if self.pre_step():
            with self._training.stepping():
                self.original_optimizer.step()
        return value

    def _refuse_rehearsed(self) -> None:
        """Raise Incompatible for the step that torch.distributed.checkpoint takes to make a state.

        It sets rates and gradients to zero first.
        """
        if self._training.tape is not None or any(float(g.get("lr", 1)) for g in self.param_groups):
            return
        grads = [p.grad for p in self.params]
        if all(g is not None and not g.any() for g in grads):
            self._forget()
            raise Incompatible(
                "Expected the state of the private optimizer by its state_dict(), which holds the "
                "ledger, got get_state_dict or set_state_dict of torch.distributed.checkpoint, "
                "which step it and leave the ledger out. Save optimizer.state_dict() as it is; the "
                "learning rates are 0 now, set them again."
            )

    def pre_step(self, closure: Any = None) -> bool:
        """Clip and add up; on the last piece of a batch also noise. Return whether to step."""
        try:
            due = self._add_piece()
            self._is_last_step_skipped = not due.last
            if not due.last:
                return False
            self._release()
            self.scale_grad()
        except BaseException:
            self._forget()
            raise
        if self.step_hook:
            self.step_hook(self)
        return True

    def clip_and_accumulate(self) -> None:
        """Clip the examples of the announced batch and add them to the sums."""
        self._add_piece()

    def _add_piece(self) -> Due:
        tape, due = self._training.take()
        clip = _checked("max_grad_norm", self.max_grad_norm, above=True)
        self._check_group()
        if leaked := tape.leak():
            raise _around(leaked)
        called = {p: n for n, p in tape.parameters()}
        self._refuse_replaced(tape, called)
        if due.piece == 0:  # what an unfinished batch left goes
            self._sums, self._clip, self._rate = {}, clip, due.rate
        elif self._next != (due.batch, due.piece):
            raise Unprotected(
                f"Expected every piece of a batch to be stepped on, got piece {due.piece + 1} "
                "without those before it. Call optimizer.step() after each piece, or loader.skip()."
            )
        self._refuse_schedule_between(due)
        clipped = clipped_sum(
            tape, self._clip, clipping=self._clipping, scale=tape.batch, real=due.real
        )
        sums = clipped.sums
        self._note_left_out(clipped.norms[: due.real])
        if stray := self._stray():
            raise _around(stray)
        if not sums:
            raise Unprotected(
                "Expected loss.backward() between the pass of a batch and its step, got none. Call "
                "loader.skip() in place of the step for a batch that you do not want."
            )
        named = {p: self._name_in(sums, p, called) for p in self.params}
        if not any(name in sums for name in named.values()):
            raise Unprotected(
                f"Expected a pass that trains what the optimizer holds, got one of {min(sums)} and "
                "others that it does not hold: the step would be noise alone. Freeze and choose "
                "adapters (set_adapter) first, then call guard.prepare with an optimizer of what "
                "is trained."
            )
        for p, name in named.items():
            total = sums.get(name)
            total = torch.zeros_like(p) if total is None else total.to(p.dtype).view_as(p)
            self._sums[p] = self._sums[p] + total if p in self._sums else total
        self._next = (due.batch, due.piece + 1)
        return due

    def _refuse_schedule_between(self, due: Due) -> None:
        """Raise Incompatible if the learning rate changed between two pieces of one batch."""
        rates = [float(group["lr"]) for group in self.param_groups if "lr" in group]
        if due.piece == 0:
            self._rates = rates
        elif rates != self._rates:
            raise Incompatible(
                f"Expected one learning rate for all pieces of a batch, got another at piece "
                f"{due.piece + 1}: a schedule counts each piece as a step. Call scheduler.step() "
                "where loader.ends_step is true only, or take whole batches from "
                "vitguard.defenses.privacy.whole.WholeBatches(loader)."
            )

    def _name_in(
        self, sums: Mapping[str, Tensor], parameter: nn.Parameter, called: Mapping[Any, str]
    ) -> str:
        """Return the name of a parameter in a pass: torch's pruning renames it, adapters too."""
        name = self._name(parameter)
        return name if name in sums else called.get(parameter, name)

    def _refuse_replaced(self, tape: Tape, called: Mapping[Any, str]) -> None:
        """Raise Unprotected if the pass went through parameters that the optimizer does not hold.

        Those of its own would be moved by noise alone, and the pass would train nothing.

        Args:
            called: What the pass calls its parameters.
        """
        known = set(self._names.values())
        replaced = (n for n, p in tape.parameters() if n in known and p not in self._names)
        gone = (self._name(p) for p in self.params if p not in called)
        if name := next(replaced, next(gone, None)):
            raise Unprotected(
                "Expected the parameters that the model had when it was prepared, got another in "
                f"place of {name}: something replaced them since (FSDP spreads them over "
                "processes, others convert or parametrize them). Call guard.prepare again, and "
                "under differential privacy use DistributedDataParallel in place of FSDP."
            )

    def _note_left_out(self, norms: Tensor) -> None:
        """Warn, once, that examples without a finite gradient were left out; count them all."""
        lost = int((~torch.isfinite(norms)).sum())
        if lost and not self.left_out:
            warnings.warn(
                f"Expected finite gradients, got {lost} of {len(norms)} examples whose gradient is "
                "not: they were left out of this step, which is noise alone where all are. Look "
                "for NaN in the images and the loss, or a learning rate that is too large.",
                stacklevel=2,
            )
        self.left_out += lost

    def _stray(self) -> str | None:
        """Return a parameter with a gradient that the optimizer would step on, if any."""
        held = (p for group in self.param_groups for p in group["params"])
        return next((self._name(p) for p in held if p.grad is not None), None)

    def _name(self, parameter: nn.Parameter) -> str:
        if parameter not in self._names:
            raise Unprotected(
                "Expected the parameters that the model had when it was prepared, got another of "
                f"shape {tuple(parameter.shape)} in the optimizer. Call guard.prepare again."
            )
        return self._names[parameter]

    def _release(self) -> None:
        """Write the release down, then make it: noise on the sums, as each parameter's gradient."""
        noise = _checked("noise_multiplier", self.noise_multiplier)
        if self._place[1] > 1:
            self._agree([noise, self._clip, self._rate, float(len(self._sums))])
        self._tell_of_uncounted()
        self._spend(noise, self._rate)
        self._noise(noise)

    def _tell_of_uncounted(self) -> None:
        """Warn where weights were loaded since the model was prepared, and no ledger with them."""
        if not self._training.loaded or self._ledger.history or rounds.current() is not None:
            return
        self._training.loaded = False
        warnings.warn(
            "Expected what was spent on the weights that were loaded since guard.prepare, got an "
            "empty ledger at the first step: where they were trained privately on these records, "
            "that does not count. Load the state of the private optimizer too, which holds the "
            "ledger (with timm leave --no-resume-opt out), or guard.load_state_dict(); load "
            "weights from elsewhere before guard.prepare, and a server's inside guard.round.",
            stacklevel=2,
        )

    def add_noise(self) -> None:
        """Write the release down and make it, as a step does, without scaling it or stepping.

        Raises:
            Unprotected: No sums are there, or the ledger refuses; nothing is released.
        """
        if not self._sums:
            raise Unprotected("Expected clipped sums to add noise to, got none. Call step().")
        try:
            self._release()
        except BaseException:
            self._forget()
            raise

    def _noise(self, noise: float) -> None:
        """Put the sums with noise of deviation `noise * clip` into the parameters' gradients."""
        sums, self._sums, self._next = self._sums, {}, None
        rank, world = self._place
        totals = {self._name(p): t.contiguous() for p, t in sums.items()}
        if world > 1:
            self._together(lambda: [_reduce(t) for t in totals.values()])
        if rank == 0:
            totals = self._draws.noised_all(totals, noise * self._clip)
        if world > 1:
            self._together(lambda: [torch.distributed.broadcast(t, 0) for t in totals.values()])
        for p in sums:
            p.grad = totals[self._name(p)].to(p).view_as(p)

    def scale_grad(self) -> None:
        """Divide by the number of examples that a batch has on average."""
        assert self.expected_batch_size is not None
        for p in self.params:
            if p.grad is not None:
                p.grad /= self.expected_batch_size * self._place[1]

    def _forget(self) -> None:
        self._sums, self._next = {}, None
        self.zero_grad()

    # several processes

    def _check_group(self) -> None:
        if (now := place()) != self._place:
            rank, world = self._place
            raise Unprotected(
                f"Expected the processes of guard.prepare, rank {rank} of {world}, got rank "
                f"{now[0]} of {now[1]}: noise and sampling were planned for the others. Call "
                "guard.prepare again after init_process_group."
            )

    def _agree(self, values: list[float]) -> None:
        """Raise Unprotected, on every process, unless all are about to do the same."""
        device = next(iter(self._names)).device
        kind = torch.float32 if device.type == "mps" else torch.float64
        mine = torch.tensor(values, dtype=kind, device=device)
        most = torch.cat([mine, -mine])
        maximum = torch.distributed.ReduceOp.MAX
        self._together(lambda: torch.distributed.all_reduce(most, maximum))
        high, low = most[: len(values)], -most[len(values) :]
        if not torch.equal(high, low):
            raise Unprotected(
                "Expected the same noise_multiplier, max_grad_norm, sampling rate and parameters "
                f"on every process, got from {low.tolist()} to {high.tolist()}. Change them on "
                "every process alike."
            )

    def _together(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise Unprotected(
                f"Expected all {self._place[1]} processes at the step, got one that is gone "
                f"({error}); nothing was applied. Form the group again and call guard.prepare."
            ) from error


def _around(name: str) -> Unprotected:
    return Unprotected(
        f"Expected every gradient to come through clipping, got one of {name} around it: a loss "
        "outside the model's own forward pass, a pass in eval mode, or a torch.autograd.Function "
        "of one's own (LoHa and OFT of PEFT). Call optimizer.zero_grad() before each batch and "
        "keep the loss a function of outputs."
    )


def _reduce(total: Tensor) -> None:
    torch.distributed.reduce(total, 0)


def _checked(name: str, value: Any, *, above: bool = False) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (number > 0 if above else number >= 0) or not number < math.inf:
        raise Unprotected(
            f"Expected a finite {name} {'above' if above else 'of at least'} 0 at the step, got "
            f"{value}. Nothing was released; a schedule may have set it."
        )
    return number


def refuse_optimizer(optimizer: Any) -> None:
    """Raise Incompatible for an optimizer that asks for several passes over a batch."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise Incompatible(f"Expected a torch optimizer, got {type(optimizer).__name__}.")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise Incompatible(
            f"Expected a plain torch optimizer, got {type(optimizer).__name__} around one: its "
            "steps cannot be watched. Pass the optimizer itself, before other tools wrap it."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise Incompatible(
            "Expected an optimizer that takes one gradient a step, got "
            f"{type(optimizer).__name__}, which evaluates its closure several times: each is a "
            "release of its own. Use SGD or AdamW."
        )
