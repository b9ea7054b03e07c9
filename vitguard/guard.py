"""protect(): folds defenses around a model and one local step."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from vitguard import rounds, wrapping
from vitguard.analysis import refuse_given_away
from vitguard.core import Batch, LocalTraining, Loss, Traits, Update
from vitguard.defenses.base import (
    BatchDefense,
    Defense,
    Draws,
    Installed,
    Ledgered,
    ModelDefense,
    StepDefense,
    UpdateDefense,
    rewinding,
    traits_of,
)
from vitguard.defenses.gate import LeakGate, Tally, Tried
from vitguard.defenses.protection import Protection
from vitguard.errors import Incompatible, InputError, Unprotected, VitguardError, expected
from vitguard.files import parsed_json
from vitguard.inspection import Inspection, Memory, inspect_model, load_exactly
from vitguard.joining import drop, embeddings, frozen_by_peft, join
from vitguard.registry import parse_stack
from vitguard.self_attack import attack_own
from vitguard.tensor_files import check_plain
from vitguard.vit import Anatomy, canonical_name, canonical_parameters, logits_of

__all__ = ["Guard", "Protection", "Stack", "protect", "stack_of"]

Stack = Iterable[Defense] | Defense | str
"""Defenses that act together: several, a single one, or a spec for `parse_stack`."""

_PLACES = (ModelDefense, BatchDefense, StepDefense, UpdateDefense, LeakGate)


def stack_of(defenses: Stack) -> list[Defense]:
    """Return the defenses that a stack in any of its three forms means.

    Raises:
        InputError: Something else, such as a class in place of an instance, or a wrong spec.
    """
    if isinstance(defenses, str):
        return parse_stack(defenses)
    stack = list(defenses) if isinstance(defenses, Iterable) else [defenses]
    strangers = [d for d in stack if not isinstance(d, _PLACES)]
    if strangers:
        raise expected(
            "defenses",
            repr(strangers[0]),
            "A stack is a list such as [vg.FixedPositions('frozen')] or a spec such as "
            "'positions:kind=frozen'; audit takes several as {name: stack}.",
        )
    return stack


def protect(
    model: nn.Module,
    defenses: Stack,
    *,
    anatomy: Anatomy | None = None,
    generator: torch.Generator | None = None,
) -> Guard:
    """Fold defenses around a model, in place.

    Args:
        model: A Vision Transformer that `Anatomy` recognises, not yet compiled or distributed. Of
            a PEFT model the one inside it is protected.
        defenses: What to apply: a list, a single defense, or a spec such as
            `"positions:kind=frozen+shuffle"`. The place fixes the order (model, batch, step,
            update); inside a place the list does.
        anatomy: Names and sizes of a model that is not recognised.
        generator: Source of every draw, for tests and audits: a seed can be searched, so no
            guarantee holds then, and `privacy_spent` says so. By default every draw is fresh from
            the operating system.

    Raises:
        UnsupportedModel: No Vision Transformer was recognised.
        Incompatible: The defenses cannot work together or on this model; the model is unchanged.
        InputError: The model is wrapped or protected already, or something is no defense.
    """
    model = wrapping.bare(model)
    stack = stack_of(defenses)
    anatomy = anatomy or wrapping.anatomy_of(model)
    ordered = [d for place in _PLACES for d in stack if isinstance(d, place)]
    names = [d.name for d in ordered]
    if repeated := {n for n in names if names.count(n) > 1}:
        raise Incompatible(f"Expected each defense once, got {', '.join(sorted(repeated))} twice.")
    if sum(isinstance(d, StepDefense) for d in ordered) > 1:
        raise Incompatible("Expected at most one defense of the step, got two. Drop one.")
    if any(isinstance(d, ModelDefense) for d in ordered):
        wrapping.require_values(model)
    for defense in ordered:
        defense.check(model, anatomy, ordered)
    refuse_given_away(model, anatomy, ordered)
    draws = Draws(generator)
    protection = Protection(anatomy, tuple(ordered), draws)
    before = list(model.parameters())
    try:
        for defense in ordered:
            if isinstance(defense, ModelDefense):
                protection.add_module(defense.name, defense.install(model, anatomy, draws))
    except BaseException:
        protection.uninstall(model)
        raise
    left = {id(p) for p in model.parameters()}
    protection.taken = WeakIdKeyDictionary({p: None for p in before if id(p) not in left})
    model.add_module("vitguard", protection.train(model.training))
    if any(isinstance(d, StepDefense) for d in ordered):
        protection.watch_training(model)
    protection.watch_sending(model)
    return Guard(model)


class Guard:
    """A protected model's handle: made by `protect`, or found again with `Guard.of(model)`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._protection: Protection = model.get_submodule("vitguard")  # type: ignore[assignment]
        self._draws = self._protection.draws
        self._ledgers = self._protection.ledgers

    @staticmethod
    def of(model: nn.Module) -> Guard:
        """Return a guard for a protected model, such as a copy; its draws start afresh."""
        if Protection.of(model) is None:
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

    def _step(self) -> StepDefense | None:
        return next((d for d in self.defenses if isinstance(d, StepDefense)), None)

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
        losses = [piece.auxiliary_loss() for piece in self._protection.installed()]
        total = next(self.model.parameters()).new_zeros(())
        return sum((x for x in losses if x is not None), start=total)

    def prepare(self, optimizer: torch.optim.Optimizer, loader: Any = None) -> Any:
        """Make an optimizer (and loader) right for the protected model, like accelerate's prepare.

        Parameters that a defense added join the groups of the optimizer that hold their like (see
        `vitguard.joining`), and those that one took out of the model leave it, so schedulers built
        around it go on. Under differential privacy the returned optimizer and loader replace the
        old ones, whose next step raises.

        Of a PEFT model, what a defense added is trained too, though PEFT froze it.

        Returns:
            The optimizer, or `(optimizer, loader)` when a loader is given.

        Raises:
            InputError: The model is frozen whole, or the optimizer cannot take in what was added.
        """
        self._trained()
        for parameter in frozen_by_peft(self.model):
            parameter.requires_grad_(True)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if gone := [p for p in self._protection.taken if id(p) in known]:
            drop(optimizer, gone)
        added = dict(self._protection.named_parameters(prefix="vitguard"))
        if added := {name: p for name, p in added.items() if p.requires_grad}:
            join(optimizer, added, self.model, self.anatomy)
        step = self._step()
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
        return asked.privacy_spent(self._ledgers[name])

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
        self._require_sent()
        wrapping.require_whole(self.model, "guard.update")
        self._check_batch(images, labels)
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
            tensors = self._gradient(batch, loss)
        else:
            tensors = self._difference(batch, loss, training)
        self.verify()
        update = Update(tensors=tensors, batch_size=len(labels), **training.facts())
        return self._seal(update, Batch(images, labels))

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
            InputError: Names, shapes or types that the model does not have.
        """
        self._check_batch(images, labels)
        model = self.public_model()
        load_exactly(model, weights)
        memory = self._protection.memory
        return inspect_model(model, self.anatomy, images, labels, memory, loss=loss, limit=limit)

    def accept(self, weights: Mapping[str, Tensor]) -> None:
        """Remember weights as accepted, for the next `inspect`. `InspectWeights` does it by itself.

        A random projection of them is kept, with the ledgers in `state_dict`.
        """
        memory = self._protection.memory
        named = {canonical_name(n): t for n, t in weights.items()}
        memory.accept(memory.traces(named, self.anatomy))

    def _check_batch(self, images: Tensor, labels: Tensor) -> None:
        channels, classes = self.anatomy.channels, self.anatomy.classes
        if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
            got = f"{type(images).__name__} and {type(labels).__name__}"
            raise expected("images and labels as tensors", got, "torch.as_tensor makes them.")
        if images.is_meta or labels.is_meta:
            raise expected("images and labels with values", "some on the meta device")
        if images.dim() != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise expected(
                f"floating-point images of shape (batch, {channels}, height, width)",
                f"{images.dtype} of shape {tuple(images.shape)}",
            )
        if len(labels) != len(images) or not len(images):
            raise expected(f"one label for each of {len(images)} images", len(labels))
        indices = not labels.is_floating_point()
        if indices and classes and not bool(((labels >= 0) & (labels < classes)).all()):
            raise expected(f"labels from 0 to {classes - 1}", labels.tolist())

    def _gradient(self, batch: Batch, loss: Loss) -> dict[str, Tensor]:
        try:
            return self._backward(batch, loss)
        except (AssertionError, RuntimeError, ValueError) as error:
            # only some models take images of another size, type or device, and each refuses them
            # in its own way
            misfit = None if isinstance(error, VitguardError) else self._misfit(batch)
            if misfit is None:
                raise
            raise misfit from error

    def _misfit(self, batch: Batch) -> InputError | None:
        """Return what of a batch is not as the model is: size, type or device."""
        own, given = self.anatomy.image_size, tuple(batch.images.shape[2:])
        if own != given:
            return expected(
                f"images of {own[0]} x {own[1]} pixels", f"{given[0]} x {given[1]}",
                "Resize them, or build the model for their size.",
            )  # fmt: skip
        weight = self.model.get_parameter(self.anatomy.patch_weight)
        images, labels = batch.images, batch.labels
        if (images.device, images.dtype) != (weight.device, weight.dtype):
            return expected(
                f"images in {weight.dtype} on {weight.device}, as the model is",
                f"{images.dtype} on {images.device}",
                "Use images.to(parameter), with a parameter of the model.",
            )
        if labels.device != images.device:
            return expected(f"labels on {images.device}, as the images are", labels.device)
        return None

    def _backward(self, batch: Batch, loss: Loss) -> dict[str, Tensor]:
        step = self._step()
        if step is not None:
            self._trained()
            with self._released([step]), self.rehearsing():
                return dict(step.gradient(self.model, loss, batch, self._draws))
        parameters = self._trained()
        total = loss(logits_of(self.model(batch.images)), batch.labels) + self.auxiliary_loss()
        gradients = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
        return dict(zip(parameters, gradients, strict=True))

    def _trained(self) -> dict[str, nn.Parameter]:
        parameters = canonical_parameters(self.model)
        added = {id(p) for p in self._protection.parameters()}
        if all(id(p) in added for p in parameters.values()):
            raise expected(
                "a model with a parameter to train", "one that is frozen whole",
                "Unfreeze what the client trains: parameter.requires_grad_(True).",
            )  # fmt: skip
        return parameters

    @contextmanager
    def _released(self, defenses: Sequence[Defense]) -> Iterator[None]:
        """Count what the block makes before it leaves; what cannot be afforded is not made."""
        ledgered = [d for d in defenses if isinstance(d, Ledgered)]
        for defense in ledgered:
            defense.admit(self._ledgers[defense.name])
        yield
        for defense in ledgered:  # refuses once more: another thread may have spent the rest
            defense.record(self._ledgers[defense.name], void=self._draws.void)

    def rewound(self) -> AbstractContextManager[None]:
        """Put back, at the end of the context, how far the defenses' schedules have come.

        For an update that is only looked at: an adversary starts from the step before it.
        """
        return rewinding(self._protection.installed())

    def _difference(self, batch: Batch, loss: Loss, training: LocalTraining) -> dict[str, Tensor]:
        parameters = self._trained()
        before = {name: p.detach().clone() for name, p in parameters.items()}
        stepper = training.stepper(parameters.values())
        held = {name: p.grad for name, p in parameters.items()}
        try:
            for _ in range(training.steps):
                for name, gradient in self._gradient(batch, loss).items():
                    parameters[name].grad = gradient
                with self.rehearsing():
                    stepper.step()
            return {name: p.detach() - before[name] for name, p in parameters.items()}
        finally:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(before[name])
                    p.grad = held[name]

    def release(self) -> None:
        """Let every training pass through unprotected: for a copy whose gradients nobody sees.

        Not for training that ends in a model which leaves: see `keep_local`.
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
        """Say that training ends in an update which `seal` protects; `guard.round` says it too.

        Without it a stack with defenses of the update warns at the first optimizer step, and the
        trainers of `vitguard.integrations` refuse: they end in a checkpoint, on which these
        defenses never act.
        """
        self._protection.destination = "sealed"

    def _require_sent(self) -> None:
        if self._protection.destination == "local":
            raise Unprotected(
                "Expected no update to leave, as guard.keep_local() said, got one. Leave that call "
                "out where updates are sent."
            )

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
        self._require_sent()
        if any(isinstance(d, BatchDefense) for d in self.defenses):
            raise Unprotected(
                "Expected an update that update() made: the batch was not transformed."
            )
        step = self._step()
        if step is not None and not self._protection.prepared:
            raise Unprotected(
                f"Expected training under prepare(), got a finished update: {step.name} "
                "needs each example's own gradient. Call prepare(optimizer, loader) and train."
            )
        for piece in self._in_place():
            piece.settle()
            piece.intact(self.model)
        self._require_released(update)
        if batch is not None:
            self._check_batch(*batch)
        return self._seal(update, None if batch is None else Batch(*batch), trained=True)

    def _require_released(self, update: Update) -> None:
        """Raise Unprotected if an update says something that no private step released."""
        step = self._step()
        if self._protection.exposed:
            raise Unprotected(
                "Expected gradients of the private loop only, got a plain one (of a pass in eval "
                "mode, or around the model's own forward) between protect and prepare. Load the "
                "weights from before it, then train on what prepare returned."
            )
        if not isinstance(step, Ledgered) or not isinstance(update, Update):
            return
        if not self._ledgers[step.name].steps and any(
            bool(t.any()) for t in update.tensors.values()
        ):
            raise Unprotected(
                f"Expected an update that private steps made, got one while the ledger of "
                f"{step.name} counts none. Train on the optimizer and loader that prepare "
                "returned; after a restart call guard.load_state_dict with what the guard saved."
            )

    def _seal(self, update: Update, batch: Batch | None, *, trained: bool = False) -> Update:
        if not isinstance(update, Update):
            raise expected(
                "an Update", type(update).__name__,
                "Wrap the tensors: vg.Update(tensors, kind='difference', batch_size=8).",
            )  # fmt: skip
        tensors = {
            canonical_name(name): wrapping.gathered(t.detach())
            for name, t in update.tensors.items()
        }
        known = {canonical_name(name) for name in self.model.state_dict()}
        if strangers := sorted(tensors.keys() - known):
            raise expected(
                "an update by the model's parameter names", strangers[0],
                "A name that no defense knows would leave unprotected.",
            )  # fmt: skip
        for name, tensor in tensors.items():
            check_plain(name, tensor, "the update")
        made = update = replace(update, tensors=tensors)
        held: dict[str, str] = {}
        for piece in self._protection.installed():
            piece.releasing(self.model)
            held |= {n: r for n, r in piece.withheld().items() if n in tensors}
        acting = [d for d in self.defenses if isinstance(d, UpdateDefense)]
        frozen = self._frozen(tensors)
        left_out = {n for d in acting for n in d.leaves_out(frozen)}
        if moved := next((n for n in frozen if n in left_out and bool(tensors[n].any())), None):
            raise expected(
                f"no change of {moved}, which is frozen", "one",
                "Unfreeze it before seal: what was trained must be protected.",
            )  # fmt: skip
        reason = "frozen, so that there is nothing to send"
        held |= {n: reason for n in frozen if n in left_out}
        update = update.seal(held)
        for defense in acting:  # one by one: if the next refuses, what it says tells of this one
            with self._released([defense]):
                update = defense.seal(update, self.anatomy, self._draws)
        return self._past_gate(update, batch, made if trained else None)

    @property
    def tally(self) -> Tally:
        """What the gate of this stack decided so far, by the images: for the client alone."""
        return self._protection.tally

    def _past_gate(self, update: Update, batch: Batch | None, trained: Update | None) -> Update:
        """Return what may leave; refused where a gate is to look and has no images to look with.

        `trained` is what the training made, if it may have moved the model: the adversary knows the
        weights before it, so these are looked from as well.
        """
        gate = next((d for d in self.defenses if isinstance(d, LeakGate)), None)
        if gate is None or self._protection.ungated:
            return update
        if not gate.due(self.tally):
            gate.skip(self.tally)
            return update
        if batch is None or len(batch.images) != update.batch_size:
            raise Unprotected(
                f"Expected the {update.batch_size} images behind the update for the gate, got "
                f"{0 if batch is None else len(batch.images)}. Call guard.seal(update, "
                "batch=(images, labels))."
            )
        models = [self.public_model()]
        if trained is not None and trained.kind == "difference":
            models.append(_taken_back(self.public_model(), trained))

        def attack(seen: Update) -> list[Tried]:
            return [
                tried
                for model in models
                for tried in attack_own(
                    model, seen, batch, defenses=self.defenses, traits=self.traits,
                    extras=self.extras(), work=gate.work / len(models),
                )
            ]  # fmt: skip

        return gate.passage(update, attack, self.tally)

    @contextmanager
    def ungated(self) -> Iterator[None]:
        """Let updates pass a gate unseen and uncounted: an audit's attacks judge them."""
        before, self._protection.ungated = self._protection.ungated, True
        try:
            yield
        finally:
            self._protection.ungated = before

    def round(
        self, number: int, *, base: str, weight: float = 1.0, client: str = ""
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
        return rounds.bound(rounds.Round(number, base, weight, client))

    def shared_names(self) -> tuple[str, ...]:
        """Return the names of the tensors that a client sends and takes back, in order.

        The base model's parameters and buffers and the parameters that defenses added (an unknown
        token), by the base model's names. Not what stays local: withheld or fixed positions, and
        the defenses' own buffers, such as how far a schedule has come.
        """
        held = {n for piece in self._protection.installed() for n in piece.withheld()}
        added = {f"vitguard.{name}" for name, _ in self._protection.named_parameters()}
        state = (name for name, t in self.model.state_dict().items() if isinstance(t, Tensor))
        sent = (n for n in state if not n.startswith("vitguard.") or n in added)
        return tuple(n for name in sent if (n := canonical_name(name)) not in held)

    def encrypted(self) -> dict[str, Tensor]:
        """Return the parameters that the stack encrypts, as they stand, by name.

        What `Manifest.of` describes: protect a copy of the model with the stack, without an
        encryptor, make the manifest of this, then the encryptors, then protect with them.
        """
        held = {n for piece in self._protection.installed() for n in piece.withheld()}
        sent = {n: p for n, p in canonical_parameters(self.model).items() if n not in held}
        chosen = {n for s in self.traits.sealed for n in self.anatomy.select(s, sent)}
        return {n: p.detach() for n, p in sent.items() if n in chosen}

    def _frozen(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Return the frozen parameters in a difference of whole state dicts; they are public."""
        weights = {canonical_name(n): p for n, p in self.model.named_parameters()}
        return [n for n in tensors if n in weights and not weights[n].requires_grad]

    def truth(self) -> Mapping[str, Tensor]:
        """Return the last secret draws, for scores only; an attack never sees them."""
        return {k: v for piece in self._protection.installed() for k, v in piece.truth().items()}

    def redraw(self, generator: torch.Generator | None) -> None:
        """Take every later draw from `generator`, as `protect` does; None for fresh entropy."""
        self._draws.redraw(generator)

    def public_model(self) -> nn.Module:
        """Return a clean copy of what the public knows: no hooks, secrets or local values."""
        model = copy.deepcopy(self.model)
        protection: Protection = model.get_submodule("vitguard")  # type: ignore[assignment]
        for piece in reversed(protection.installed()):
            piece.publish(model)
        protection.unwatch()
        del model.vitguard
        return model

    def extras(self) -> dict[str, Tensor]:
        """Return what the defenses added to the model (an unknown token, a head), by name."""
        state = self._protection.state_dict(prefix="vitguard.")
        return {k: v.detach().clone() for k, v in state.items() if isinstance(v, Tensor)}

    def export(self) -> dict[str, Tensor]:
        """Return a state dict of the base model alone, for a model without vitguard."""
        state = self.model.state_dict()
        return {k: v for k, v in state.items() if not k.startswith("vitguard.")}

    def remove(self) -> None:
        """Give the model its original architecture back, in place."""
        if getattr(self.model, "vitguard", None) is self._protection:
            self._protection.uninstall(self.model)
            del self.model.vitguard

    def state_dict(self) -> dict[str, Any]:
        """Return what was spent: local, never to be averaged.

        Secret draws have no state. Those of a generator given to `protect` go on from theirs.
        """
        state: dict[str, Any] = {"version": 2}
        state["ledger"] = {name: ledger.state_dict() for name, ledger in self._ledgers.items()}
        if self._protection.memory.rounds:
            state["inspection"] = self._protection.memory.state_dict()
        if self._draws.seeded is not None:
            state["draws"] = self._draws.seeded.get_state()
        return state

    def state_bytes(self, *, draws: bool = True) -> bytes:
        """Return `state_dict` as JSON, for a place that keeps bytes. Local, never to be averaged.

        Args:
            draws: With the state of a generator that was given to `protect`. False leaves the
                ledger alone, which holds no secret.
        """
        state = self.state_dict()
        generator = state.pop("draws", None)
        if draws and generator is not None:
            state["draws"] = generator.numpy().tobytes().hex()
        try:
            return json.dumps(state, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise expected("ledgers that JSON can hold", str(error)) from error

    def load_state_bytes(self, data: bytes) -> None:
        """Continue where `state_bytes` left off, as `load_state_dict` does.

        Raises:
            InputError: They are something else, of another stack, or older than the ledger.
        """
        try:
            state = dict(parsed_json(data))
            if "draws" in state:
                raw = bytearray.fromhex(state["draws"])
                state["draws"] = torch.frombuffer(raw, dtype=torch.uint8)
        except (TypeError, ValueError) as error:
            raise expected("bytes from Guard.state_bytes", type(error).__name__) from error
        self.load_state_dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a `state_dict` left off. A ledger never goes back: it joins the state's.

        Raises:
            InputError: The state is something else, of another stack, or older than the ledger.
        """
        try:
            spent = dict(state["ledger"] or {})
        except (KeyError, TypeError, ValueError) as error:
            raise expected("a state from Guard.state_dict", repr(error)) from error
        if strangers := sorted(spent.keys() - self._ledgers.keys()):
            raise expected(
                "a ledger of this stack's defenses", strangers[0], "Protect with it, as before."
            )
        for name, ledger in spent.items():  # a state that is refused changes nothing
            copy.deepcopy(self._ledgers[name]).load_state_dict(ledger)
        memory = Memory()
        if "inspection" in state:
            memory.load_state_dict(state["inspection"])
        if self._draws.seeded is not None and "draws" in state:
            try:
                self._draws.seeded.set_state(state["draws"])
            except (TypeError, RuntimeError) as error:
                raise expected("a state from Guard.state_dict", repr(error)) from error
        for name, ledger in spent.items():
            self._ledgers[name].load_state_dict(ledger)
        if memory.rounds:
            self._protection.memory.load_state_dict(memory.state_dict())


def _taken_back(model: nn.Module, update: Update) -> nn.Module:
    """Return the model with a difference subtracted, in place."""
    with torch.no_grad():
        for name, p in canonical_parameters(model).items():
            if name in update.tensors:
                p -= update.tensors[name].to(p)
    return model
