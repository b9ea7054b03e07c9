"""The four kinds of defense, by where they act: model, batch, step, update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitguard.core import Batch, Loss, Traits, Update
from vitguard.defenses.gradient_watch import Watched, unseen_gradient, watch_gradients
from vitguard.draws import Draws
from vitguard.errors import Incompatible, Unprotected
from vitguard.vit import Anatomy

__all__ = [
    "BatchDefense",
    "Defense",
    "Draws",
    "Installed",
    "Ledgered",
    "ModelDefense",
    "StepDefense",
    "UpdateDefense",
    "Watched",
    "hooks_gone",
    "rewinding",
    "traits_of",
    "unseen_gradient",
    "watch_gradients",
    "written",
]


class Defense(ABC):
    """A thing in, a safer thing of the same kind out. Subclasses are frozen dataclasses."""

    name: ClassVar[str]
    promise: ClassVar[str] = ""
    """What holds by proof or by a key whatever the attack, in one sentence; "" where nothing does.

    `vitguard advise` names the defenses that have one, with their default settings.
    """

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values; public, and what the adversary is told."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def spec(self) -> str:
        """Return the defense as the command line writes it, defaults left out."""
        changed = [
            f"{f.name}={written(v)}"
            for f in fields(self)  # type: ignore[arg-type]
            if (v := getattr(self, f.name)) != f.default
        ]
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    def check(  # noqa: B027 - most defenses work everywhere
        self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]
    ) -> None:
        """Raise Incompatible if the defense cannot work on this model within this stack."""

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return what is publicly true of an update after this defense, given what was before it.

        All that attacks, plan and audit know of a defense. The default changes nothing.
        """
        return before

    def known(self) -> Defense:
        """Return what the adversary runs on the public model to act as this defense does.

        A defense whose draw is public by now (it is in the model) must not draw again.
        """
        return self

    def reconstruction_bound(self, prior: float, steps: int) -> float | None:
        """Return the most often that any attack on one update succeeds; None without a guarantee.

        Args:
            prior: Chance in [0, 1] that a guess succeeds without the update.
            steps: Local steps behind the update.
        """
        return None

    def least_batch(self, anatomy: Anatomy) -> int:
        """Return the images behind the smallest update of a model that the defense lets leave."""
        return 1

    def audit_note(self) -> str:
        """Return what a reader of an audit must know of these settings, "" where nothing."""
        return ""


def traits_of(stack: Iterable[Defense], anatomy: Anatomy) -> Traits:
    """Return what is publicly true of an update of this model under a stack."""
    traits = Traits("none" if anatomy.positions is None else "learnable")
    for defense in stack:
        traits = defense.traits(traits, anatomy)
    return traits


def written(value: Any) -> str:
    """Return a setting as the command line writes it."""
    if isinstance(value, tuple):
        return "/".join(map(written, value))
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def hooks_gone(handles: Iterable[Any]) -> bool:
    """Whether somebody else removed a hook: `module._forward_hooks.clear()`, a part replaced."""
    return any(handle.id not in (handle.hooks_dict_ref() or ()) for handle in handles)


class Installed(nn.Module):
    """What a model defense leaves on a model; lives at `vitguard.<name>` in the module tree.

    Its parameters and buffers (an unknown token, a DAL head) are what the defense adds to the
    state dict. It survives deepcopy and pickle with the model; hooks refer to it, never to a guard.
    """

    watches_steps: ClassVar[bool] = False
    """Whether `moving` is asked from the first step on, also where no forward set it off."""
    lost: frozenset[str] = frozenset()
    """Tensors whose values a move threw away (`to_empty`, the meta device) and nobody restored."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self._values()
        moved = super()._apply(fn, recurse)
        self.restore()
        after = self._values()
        gone = {n for n, old in before.items() if n in self.lost or not _same(old, after[n])}
        self.lost = frozenset(gone - self.restorable())
        return moved

    def _values(self) -> dict[str, Tensor]:
        return {n: t.detach() for n, t in (*self.named_parameters(), *self.named_buffers())}

    def restore(self) -> None:
        """Compute again, after a move, the values that follow from the settings."""

    def restorable(self) -> frozenset[str]:
        """Return the tensors that `restore` computes."""
        return frozenset()

    def require_values(self) -> None:
        """Raise Unprotected if a tensor of this defense has lost its values."""
        if self.lost:
            raise Unprotected(
                f"Expected the values that the defense gave {', '.join(sorted(self.lost))}, got a "
                "model that was moved without them (to_empty or the meta device). Materialise and "
                "load the model first, then protect it, or load what the protected model saved."
            )

    def uninstall(self, model: nn.Module) -> None:
        """Give `model` its original architecture back."""
        raise NotImplementedError

    def publish(self, model: nn.Module) -> None:
        """Turn `model`, a copy, into what the public knows: uninstalled, local values undone."""
        self.uninstall(model)

    def withheld(self) -> Mapping[str, str]:
        """Return the base parameters whose update never leaves, each with its reason."""
        return {}

    def holds(self, name: str) -> str | None:
        """Return why a tensor of the base model never leaves, None where it may.

        By default what `withheld` says; asked by name, of tensors that came later too.
        """
        return self.withheld().get(name)

    def verify(self, model: nn.Module) -> None:
        """Raise Unprotected if the defense would not act on the model as it stands."""

    def intact(self, model: nn.Module) -> None:
        """Raise Unprotected if the defense is no longer in place, whatever mode the model is in.

        Asked of a finished update, of which `settle` knows how its gradients were taken.
        """
        self.verify(model)

    def releasing(self, model: nn.Module) -> None:
        """Raise Unprotected if no update of the model may leave; asked of each one that is sealed.

        Asked before the defenses of the update act.
        """

    def arrived(self) -> None:
        """Note that other weights came in place of all that were trained."""

    def settle(self) -> None:
        """Raise Unprotected if a gradient was taken without the defense since the weights came."""

    def auxiliary_loss(self) -> Tensor | None:
        """Return the loss that the last training forward left behind, if any; read once."""
        return None

    def per_example_auxiliary(self) -> Tensor | None:
        """Return that loss per example, shape (batch,), for differential privacy; read once."""
        return None

    def abandon(self) -> None:
        """Drop what a forward left behind that broke off, so that the next one starts clean."""

    def moving(self, model: nn.Module) -> None:
        """Raise Unprotected if an optimizer, about to step, must move no parameter of the model."""

    def used(self) -> bool:
        """Whether a training forward went by; until then no optimizer must hold what was added."""
        return True

    def stepped(self) -> None:
        """Note that an optimizer is about to step the parameters of this defense."""

    def one_draw(self) -> bool:
        """Whether a whole batch gets the same draw, which its pieces must share."""
        return False

    def key_examples(self, keys: Tensor | None) -> None:
        """Draw each example of the next forwards from its own key; None for fresh draws again."""

    def pin(self, shuffled: Tensor | None) -> None:
        """Take these positions, (batch, N), as the shuffled ones instead of drawing; None: draw.

        For an adversary that read them off an update and simulates it. The gradient does not
        depend on the order of tokens that share one position, so they stay in theirs.
        """

    def truth(self) -> Mapping[str, Tensor]:
        """Return the last secret draw, for the audit's scores only: e.g. `shuffled` (batch, N)."""
        return {}


def _same(before: Tensor, after: Tensor) -> bool:
    """Whether a move kept the values, but for their type and device."""
    if before.is_meta or after.is_meta or before.shape != after.shape:
        return False
    if before is after or before.data_ptr() == after.data_ptr() != 0:
        return True
    # in the narrower type of the two: a model may go to half precision and back
    return torch.equal(before.to(after.dtype).nan_to_num(), after.to(before.device).nan_to_num())


@contextmanager
def rewinding(pieces: Iterable[Installed]) -> Iterator[None]:
    """Put back how far the pieces' schedules have come: the steps inside are only rehearsed."""
    buffers = [(b, b.clone()) for piece in pieces for b in piece.buffers()]
    try:
        yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)


class Ledgered(ABC):
    """A defense of the step or the update whose guarantee is used up by every release."""

    @abstractmethod
    def ledger(self) -> Any:
        """Return an empty ledger: it has `state_dict` and `load_state_dict`, and only grows."""

    @abstractmethod
    def admit(self, ledger: Any) -> None:
        """Raise Unprotected if what the defense guarantees does not cover one more release."""

    @abstractmethod
    def record(self, ledger: Any, *, void: str = "") -> None:
        """Write one release into the ledger, before it leaves; threads may call it at once.

        Args:
            void: Why the release has no guarantee, "" where it has.

        Raises:
            Unprotected: As `admit`; nothing is recorded.
        """

    def require_covered(self, ledger: Any) -> None:  # noqa: B027 - without a target all is covered
        """Raise Unprotected if a ledger holds more than the guarantee covers already.

        As one may that was joined with another after the training.
        """

    @abstractmethod
    def privacy_spent(self, ledger: Any) -> Any:
        """Return what the releases in the ledger add up to."""

    def one_update(self, steps: int) -> tuple[Any, float] | None:
        """Return a ledger of one update alone and the delta of its epsilon; None if not stated.

        Args:
            steps: Local steps behind the update, at least 1.
        """
        return None


class ModelDefense(Defense):
    """Acts on the model: replaces or hooks modules."""

    @abstractmethod
    def install(self, model: nn.Module, anatomy: Anatomy, draws: Draws) -> Installed:
        """Change `model` in place and return what undoes it; nothing is left on an error."""


class BatchDefense(Defense):
    """Acts on the batch before the model sees it."""

    @abstractmethod
    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Return a safer batch of the same size."""


class StepDefense(Defense):
    """Acts where the gradient is made, because it needs each example's own gradient."""

    @abstractmethod
    def gradient(
        self, model: nn.Module, loss: Loss, batch: Batch, draws: Draws
    ) -> Mapping[str, Tensor]:
        """Return the batch's protected gradient by parameter name."""

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Any,
        draws: Draws,
        ledger: Any = None,
    ) -> tuple[Any, Any, Any]:
        """Return optimizer, loader and ledger of a training loop of one's own (`Guard.prepare`).

        Raises:
            Incompatible: The defense acts in `Guard.update` alone, as it does by default.
        """
        raise Incompatible(
            f"Expected a defense that can guard a training loop, got {self.name}. Take its "
            "gradients from guard.update."
        )

    def mimic(self, examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return `gradient` on average over its draws, differentiable in each example's own.

        What an adversary that knows the settings does to its dummy images. A mean by default.

        Args:
            examples: The gradient of each example over all parameters, by name.
        """
        size = len(examples)
        return {k: torch.stack([e[k] for e in examples]).sum(0) / size for k in examples[0]}


class UpdateDefense(Defense):
    """Acts on the finished update."""

    def leaves_out(self, frozen: Sequence[str]) -> Sequence[str]:
        """Return which of the frozen parameters in an update this defense holds back.

        By default all where the defense has a guarantee: its noise would move what was never
        trained.
        """
        return frozen if isinstance(self, Ledgered) else ()

    def look(self, update: Update, images: Tensor, anatomy: Anatomy) -> None:
        """Raise Unprotected where the images behind an update are not what it needs.

        Asked before `seal`, of `Guard.update` and where `Guard.seal` is given a batch.
        """

    def awaits(self) -> Collection[str]:
        """Return the names of the tensors without which it can seal nothing: of its manifest."""
        return ()

    def feeds_back(self) -> bool:
        """Whether what `seal` cuts from an update is added to the client's next one."""
        return False

    @abstractmethod
    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return a safer update of the same kind."""

    def mimic(self, dummy: Mapping[str, Tensor], seen: Update) -> dict[str, Tensor]:
        """Return the tensors that `seal` makes of a dummy update on average over its draws.

        What an adversary that knows the settings compares with `seen`; differentiable. By default
        the dummy as it is: noise has mean zero, and what is sealed is not compared.

        Args:
            dummy: Every tensor of a plain update, by name.
            seen: What left the victim's machine.
        """
        return dict(dummy)
