"""Guard: the handle of a protected model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, SupportsFloat, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard import rounds, wrapping
from vitguard.core import Batch, LocalTraining, Loss, Traits, Update
from vitguard.defenses.base import (
    BatchDefense,
    Defense,
    Installed,
    Ledgered,
    rewinding,
    traits_of,
)
from vitguard.defenses.gate import Tally
from vitguard.defenses.protection import Protection
from vitguard.defenses.steps import given_for, remember, watch_steps
from vitguard.errors import Incompatible, Unprotected, expected
from vitguard.guard.leaving import (
    floating_buffers,
    names_by_values,
    require_released,
    require_sent,
    sealed,
)
from vitguard.guard.local_step import check_batch, difference_of, gradient_of, trained
from vitguard.guard.public import extras_of, public_copy
from vitguard.guard.state import from_bytes, load_state, state_of, to_bytes
from vitguard.inspection import Inspection, inspect_model, load_exactly
from vitguard.joining import drop, embeddings, frozen_by_peft, held_by, join
from vitguard.numbers import plain_number
from vitguard.vit import Anatomy, canonical_name, canonical_parameters

__all__ = ["Guard"]

_OF_A_COPY = (
    "of a copy whose weights were averaged or loaded since: ask the guard of the model that was "
    "trained what these spent"
)


class Guard:
    """A protected model's handle: made by `protect`, or found again with `Guard.of(model)`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._protection: Protection = model.get_submodule("vitguard")  # type: ignore[assignment]
        self._draws = self._protection.draws
        self._ledgers = self._protection.ledgers
        self._protection.watch_again(model)
        for piece in self._protection.installed():
            if piece.watches_steps:
                watch_steps(piece, model)

    @staticmethod
    def of(model: nn.Module) -> Guard:
        """Return a guard for a protected model, such as a copy; its draws start afresh."""
        if Protection.of(model) is None:
            wrapping.require_bare(model)
            raise expected(
                "a model that was protected", type(model).__name__, "Call protect first."
            )
        return Guard(model)

    def __repr__(self) -> str:
        return f"Guard({type(self.model).__name__}, {list(self.defenses)})"

    @property
    def anatomy(self) -> Anatomy:
        """Where the model keeps its parts; the classes are those of the head it has now."""
        return self._protection.anatomy.with_head_of(self.model)

    @property
    def defenses(self) -> tuple[Defense, ...]:
        """The defenses in the order they act."""
        return self._protection.defenses

    @property
    def traits(self) -> Traits:
        """What is publicly true of an update under these defenses."""
        return traits_of(self.defenses, self.anatomy)

    def verify(self) -> None:
        """Raise Unprotected if a defense would not act on the model as it stands."""
        for piece in self._in_place():
            piece.verify(self.model)

    def _in_place(self) -> list[Installed]:
        if Protection.of(self.model) is not self._protection:
            raise Unprotected(
                "Expected a protected model, got one after remove(). Protect it again."
            )
        pieces = self._protection.installed()
        for piece in pieces:
            piece.require_values()
        return pieces

    def auxiliary_loss(self) -> Tensor:
        """Return the sum of the defenses' losses of the last training forward; zero without any."""
        return self._protection.auxiliary_loss(self.model)

    def prepare(self, optimizer: torch.optim.Optimizer, loader: Any = None) -> Any:
        """Make an optimizer (and loader) right for the protected model, like accelerate's prepare.

        Parameters that a defense added join the groups of the optimizer that hold their like (see
        `vitguard.joining`), and those that one took out of the model leave it, so schedulers built
        around it go on. Call it for each optimizer of the model: what was added is trained by one
        of them. Under differential privacy the returned optimizer and loader replace the
        old ones, whose next step raises.

        Of a PEFT model, what a defense added is trained too, though PEFT froze it.

        Returns:
            The optimizer, or `(optimizer, loader)` when a loader is given.

        Raises:
            InputError: The model is frozen whole, what is given is no optimizer, or the optimizer
                cannot take in what was added.
            Incompatible: The optimizer holds nothing of this model.
        """
        parameters = trained(self.model, self._protection)
        known = held_by(optimizer)
        for parameter in frozen_by_peft(self.model):
            parameter.requires_grad_(True)
        if not any(id(p) in known for p in parameters.values()):
            raise Incompatible(
                "Expected an optimizer of the model's own parameters, got one of others alone. "
                "Build it of model.parameters(), of the very model that was protected."
            )
        if gone := [p for p in self._protection.taken if id(p) in known]:
            drop(optimizer, gone)
        added = dict(self._protection.named_parameters(prefix="vitguard"))
        if added := {name: p for name, p in added.items() if p.requires_grad}:
            join(optimizer, added, self.model, self.anatomy, given_for(self.model))
        remember(optimizer, self.model)
        step = self._protection.step
        if step is not None:
            with self.rehearsing():
                optimizer, loader, _ = step.prepare(
                    self.model, optimizer, loader, self._draws, self._ledgers.get(step.name)
                )
            self._protection.prepared = True
        return optimizer if loader is None else (optimizer, loader)

    def no_weight_decay(self) -> set[str]:
        """Return the names of embeddings of positions and tokens, which weight decay leaves out.

        What timm's models return by this name, with what a defense added. For groups made by hand;
        `prepare` puts what a defense added into the group of its like in any case.
        """
        own = getattr(self.model, "no_weight_decay", set)()
        return {str(n) for n in own} | embeddings(self.model, self.anatomy)

    def privacy_spent(self, defense: str | None = None) -> Any:
        """Return the privacy ledger's statement.

        Of a copy that was averaged or loaded, and not trained itself, its note says that the
        ledger of the trained model counts.

        Args:
            defense: The name of the defense to ask, where the stack has several: privacy of one
                record (`privacy`) and of a whole client (`client-privacy`) do not add up.

        Raises:
            InputError: No defense of the stack gives a privacy guarantee, or several do.
        """
        found = self._ledgered()
        if not found:
            raise expected("a stack with DifferentialPrivacy", f"{list(self.defenses)}")
        if len(found) > 1 or defense is not None:
            if defense not in found:
                raise expected(f"a name among {', '.join(found)}", repr(defense))
            found = {defense: found[defense]}
        ((name, asked),) = found.items()
        spent, ledger = asked.privacy_spent(self._ledgers[name]), self._ledgers[name]
        untrained = self._protection.copied.get(name) == getattr(ledger, "steps", None)
        if untrained and any(p._version for p in self.model.parameters()):
            notes = spent.note, _OF_A_COPY
            return replace(spent, note="; ".join(note for note in notes if note))
        return spent

    def _ledgered(self) -> dict[str, Any]:
        return {d.name: d for d in self.defenses if isinstance(d, Ledgered)}

    def update(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        loss: Loss = F.cross_entropy,
        learning_rate: float | None = None,
        local_steps: int = 1,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        training: LocalTraining | None = None,
    ) -> Update:
        """Return what leaves the client for one batch: sealed, by the base model's names.

        Args:
            images: Model input, shape (batch, channels, height, width).
            labels: Class indices, shape (batch,).
            loss: `loss(logits, labels)`, a mean over the batch.
            learning_rate: None gives a gradient; a value gives the weight difference after
                `local_steps` steps of `optimizer` on the whole batch. The model's own weights are
                unchanged afterwards; a defense's schedule has come so many steps further.
            training: All of this in one, with momentum and weight decay; in place of the three.

        Raises:
            Unprotected: A defense would not act (a shuffle in eval mode, for instance).
            InputError: Images or labels that are no tensors or do not fit the model.
        """
        require_sent(self._protection)
        wrapping.require_whole(self.model, "guard.update")
        check_batch(self.anatomy, images, labels, loss)
        batch = Batch(images, labels)
        for defense in self.defenses:
            if isinstance(defense, BatchDefense):
                batch = defense.transform(batch, self._draws)
        self.verify()
        said = LocalTraining(learning_rate, local_steps, optimizer)
        if training is not None and said != LocalTraining():
            raise expected(
                "training, or learning_rate, local_steps and optimizer", "both",
                "LocalTraining says all of them.",
            )  # fmt: skip
        training = training or said
        if training.learning_rate is None:
            tensors = gradient_of(self.model, self._protection, batch, loss)
        else:
            tensors = difference_of(self.model, self._protection, batch, loss, training)
        self.verify()
        update = Update(tensors=tensors, batch_size=len(labels), **training.facts())
        return sealed(self.model, self._protection, update, Batch(images, labels))

    def inspect(
        self,
        weights: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        *,
        loss: Loss = F.cross_entropy,
        limit: float = 1.0,
    ) -> Inspection:
        """Look for signs of a craft in weights that a server sent, with the client's own images.

        The gradient of the batch is taken on a copy of the public model and dropped: nothing is
        changed, and nothing leaves. `InspectWeights` does it in the round's own pass.

        Args:
            weights: Tensors by the model's names, such as a state dict; what is missing is taken
                from the model.
            images, labels: A batch, as `update` takes it.
            limit: Factor on the limits of all signs.

        Raises:
            InputError: Names, shapes or types that the model does not have, or a model that was
                built in `torch.inference_mode`.
            Incompatible: A model whose blocks are not known: crafts would stand there.
        """
        check_batch(self.anatomy, images, labels, loss)
        if any(p.is_inference() for p in self.model.parameters()):
            raise expected(
                "a model that was built outside torch.inference_mode", "inference tensors",
                "Their gradient cannot be looked at: build or load it outside.",
            )  # fmt: skip
        with torch.inference_mode(False):
            model, memory = self.public_model(), self._protection.memory
            load_exactly(model, weights)
            images, labels = images.clone(), labels.clone()  # they may be of inference mode
            return inspect_model(
                model, self.anatomy, images, labels, memory, loss=loss, limit=limit
            )

    def accept(self, weights: Mapping[str, Tensor]) -> None:
        """Remember weights as accepted, for the next `inspect`. `InspectWeights` does it by itself.

        A random projection of them is kept, with the ledgers in `state_dict`.
        """
        memory = self._protection.memory
        named = {canonical_name(n): t for n, t in weights.items()}
        memory.accept(memory.traces(named, self.anatomy))

    def rewound(self) -> AbstractContextManager[None]:
        """Put back, at the end of the context, how far the defenses' schedules have come.

        For an update that is only looked at: an adversary starts from the step before it.
        """
        return rewinding(self._protection.installed())

    def release(self) -> None:
        """Let every training pass through unprotected: for a copy whose gradients nobody sees.

        `seal` refuses from now on. Not for training that ends in a model which leaves: see
        `keep_local`.
        """
        self._protection.prepared = self._protection.rehearsal = True

    def rehearsing(self) -> AbstractContextManager[None]:
        """Let training passes through whose gradient is protected elsewhere, or never leaves."""
        return self._protection.allowed()

    def keep_local(self) -> None:
        """Say that no update of this model leaves the machine: defenses of the update stay idle.

        `update` and `seal` refuse from now on. Defenses of the model and of the step act as before.
        """
        self._protection.destination = "local"

    def will_seal(self) -> None:
        """Say that training begins that ends in an update which `seal` protects.

        `guard.round` says it too. Where `prepare` protects the steps, `seal` then refuses a change
        without one since: it came from a loop that nobody protected or counted.

        Without it a stack with defenses of the update warns at the first optimizer step, and the
        trainers of `vitguard.integrations` refuse: they end in a checkpoint, on which these
        defenses never act.
        """
        self._protection.destination = "sealed"
        step = self._protection.step
        if isinstance(step, Ledgered):
            self._protection.begun = self._protection.ledgers[step.name].steps

    def seal(self, update: Update, *, batch: tuple[Tensor, Tensor] | None = None) -> Update:
        """Apply the defenses of the update to one that training made.

        What it returns counts as released: client-level privacy spends a round of its ledger. So
        does what a gate or a later defense refuses, since the refusal tells something.

        Args:
            batch: Images (model input) and labels behind the update, which a `LeakGate` needs; they
                go nowhere else.

        Raises:
            GateClosed: A gate let it not leave.
            Unprotected: A defense would not act, or the stack needs each example's own gradient,
                which a finished update no longer has (`prepare` protects such training).
        """
        require_sent(self._protection)
        if self._protection.rehearsal:
            raise Unprotected(
                "Expected training that the stack protects, got a model that guard.release() let "
                "train as it is. Seal what a guard without that call has trained."
            )
        if any(isinstance(d, BatchDefense) for d in self.defenses):
            raise Unprotected(
                "Expected an update that update() made: the batch was not transformed."
            )
        step = self._protection.step
        if step is not None and not self._protection.passing:
            raise Unprotected(
                f"Expected training under prepare(), got a finished update: {step.name} "
                "needs each example's own gradient. Call prepare(optimizer, loader) and train."
            )
        for piece in self._in_place():
            piece.settle()
            piece.intact(self.model)
        require_released(self._protection, update)
        if batch is not None:
            check_batch(self.anatomy, *batch)
        behind = None if batch is None else Batch(*batch)
        return sealed(self.model, self._protection, update, behind, trained=True)

    @property
    def tally(self) -> Tally:
        """What the gate of this stack decided so far, by the images: for the client alone."""
        return self._protection.tally

    def ungated(self) -> AbstractContextManager[None]:
        """Let updates pass a gate unseen and uncounted: an audit's attacks judge them."""
        return self._protection.ungated()

    def round(
        self, number: SupportsIndex, *, base: str, weight: SupportsFloat = 1.0, client: str = ""
    ) -> AbstractContextManager[rounds.Round]:
        """Let the updates that are made in the block belong to a round.

        Every defense of the update can read it (`vitguard.rounds.current`); encryption binds its
        message to it.

        Args:
            number: Of the round, at least 0; never the same one twice.
            base: Version of the public model that the update refers to (`rounds.next_version`).
            weight: Of this client in the average, above 0; public.
            client: Name of this client; an encryptor of another one refuses.

        Raises:
            InputError: One of them is something else.
        """
        here = rounds.Round(plain_number(number), base, plain_number(weight), client)
        return rounds.bound(here)

    def forget_residuals(self) -> None:
        """Begin anew with error feedback: what earlier updates left out is lost.

        For a run on other weights, or one that repeats a round.
        """
        self._protection.feedback.clear()

    def shared_names(self) -> tuple[str, ...]:
        """Return the names of the tensors that a client sends and takes back, in order.

        The base model's parameters and buffers and the parameters that defenses added (an unknown
        token), by the base model's names. Not what stays local: withheld or fixed positions, and
        the defenses' own buffers, such as how far a schedule has come.
        """
        added = {f"vitguard.{name}" for name, _ in self._protection.named_parameters()}
        state = (name for name, t in self.model.state_dict().items() if isinstance(t, Tensor))
        sent = (n for n in state if not n.startswith("vitguard.") or n in added)
        twins = names_by_values(self.model)
        return tuple(
            n
            for name in sent
            if not any(map(self._protection.holds, twins[n := canonical_name(name)]))
        )

    def encrypted(self) -> dict[str, Tensor]:
        """Return the tensors that the stack encrypts, as they stand, by name.

        Parameters, tied ones by each of their names, and the buffers of floating point that a
        client sends with them, such as the means of batch norms.

        What `Manifest.of` describes: protect a copy of the model with the stack, without an
        encryptor, make the manifest of this, then the encryptors, then protect with them.
        """
        trained = canonical_parameters(self.model)
        twins = names_by_values(self.model)
        sent = {
            twin: p
            for n, p in trained.items()
            if not self._protection.holds(n)
            for twin in twins.get(n, [n])
        }
        shared = self.shared_names()
        sent |= {n: b for n, b in floating_buffers(self.model).items() if n in shared}
        chosen = {n for s in self.traits.sealed for n in self.anatomy.select(s, sent)}
        return {n: p.detach() for n, p in sent.items() if n in chosen}

    def truth(self) -> Mapping[str, Tensor]:
        """Return the last secret draws, for scores only; an attack never sees them."""
        return {k: v for piece in self._protection.installed() for k, v in piece.truth().items()}

    def redraw(self, generator: torch.Generator | None) -> None:
        """Take every later draw from `generator`, as `protect` does; None for fresh entropy."""
        self._draws.redraw(generator)

    def public_model(self) -> nn.Module:
        """Return a clean copy of what the public knows: no hooks, secrets or local values."""
        return public_copy(self.model)

    def extras(self) -> dict[str, Tensor]:
        """Return what the defenses added to the model (an unknown token, a head), by name."""
        return extras_of(self._protection)

    def export(self) -> dict[str, Tensor]:
        """Return a state dict of the base model alone, for a model without vitguard."""
        state = self.model.state_dict()
        return {k: v for k, v in state.items() if not k.startswith("vitguard.")}

    def remove(self) -> None:
        """Give the model its original architecture back, in place.

        What was spent goes with the guard: load its `state_dict` into that of the next `protect`.
        """
        if getattr(self.model, "vitguard", None) is self._protection:
            self._protection.uninstall(self.model)
            del self.model.vitguard

    def state_dict(self) -> dict[str, Any]:
        """Return what was spent: local, never to be averaged.

        With error feedback it holds residuals, which are parts of plain updates: keep it secret.
        Secret draws have no state. Those of a generator given to `protect` go on from theirs.
        """
        return state_of(self._protection)

    def state_bytes(self, *, draws: bool = True, memory: bool = True) -> bytes:
        """Return `state_dict` as JSON, for a place that keeps bytes. Local, never to be averaged.

        Args:
            draws: With the state of a generator that was given to `protect`.
            memory: With what an inspection remembers, whose key is this client's alone. Where
                both are False the ledger is left, which holds no secret.

        Raises:
            InputError: Without `draws`, where there are residuals of error feedback: these are
                secret, and the next update needs them.
        """
        return to_bytes(self.state_dict(), draws=draws, memory=memory)

    def load_state_bytes(self, data: bytes) -> None:
        """Continue where `state_bytes` left off, as `load_state_dict` does.

        Raises:
            InputError: They are something else, of another stack, or older than the ledger.
        """
        self.load_state_dict(from_bytes(data))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a `state_dict` left off. A ledger never goes back: it joins the state's.

        Residuals of error feedback go back with it: to those of the state, or to none.

        Raises:
            InputError: The state is something else, of another stack, or older than the ledger.
        """
        load_state(self._protection, state)
