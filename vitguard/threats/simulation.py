"""The differentiable update of dummy images, under every setting that the adversary knows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitguard.core import LocalTraining, Loss, Objective, Traits, Update
from vitguard.defenses.base import (
    Defense,
    Draws,
    Installed,
    StepDefense,
    UpdateDefense,
    rewinding,
)
from vitguard.errors import NotApplicable
from vitguard.guard import Guard, protect
from vitguard.randomness import draws_globally, seeded
from vitguard.vit import Anatomy, canonical_name, logits_of, math_attention

__all__ = ["Simulation"]


@dataclass(eq=False)
class Simulation:
    """Makes the update that the victim would make of dummy images, without its secrets.

    The defenses run on a copy of the public model. Each example is clipped where the victim's was.
    What was done to the finished update is done to the dummy update (`mimic`); noise has mean zero,
    so none is added. Random draws, those of dropout too, come from the generator of each call. The
    global generator stays as it was. An equal generator gives an equal update, bit for bit.

    Args:
        model: The public model; it is copied.
        anatomy: Of the model.
        defenses: What the victim runs.
        extras: What they added to the model, by name.
        like: The seen update: its kind, steps and readable tensors are the dummy's too.
        loss: The victim's criterion.
    """

    model: nn.Module
    anatomy: Anatomy
    defenses: tuple[Defense, ...]
    extras: Mapping[str, Tensor]
    like: Update
    loss: Loss
    _twin: Guard | None = field(default=None, init=False)
    _random: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._pieces: list[Installed] = []
        self._known: dict[str, nn.Parameter] = {}
        steps = [d for d in self.defenses if isinstance(d, StepDefense)]
        self._step = steps[0] if steps else None
        self._mimics = [
            d
            for d in self.defenses
            if isinstance(d, UpdateDefense) and type(d).mimic is not UpdateDefense.mimic
        ]

    def update(
        self,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        shuffled: Tensor | None = None,
        *,
        pruned: bool = True,
    ) -> Update:
        """Return the dummy update, differentiable by what requires grad; see `View.simulate`.

        Raises:
            NotApplicable: Local steps of an optimizer that cannot be simulated.
        """
        with self._prepared(generator, shuffled) as guard, math_attention():
            if self.like.kind == "difference":
                tensors = self._difference(guard, images, labels, shuffled)
            else:
                tensors = self._gradient(guard, images, labels, shuffled, self._weights(guard))
        tensors = {canonical_name(k): t for k, t in tensors.items()}
        held = {n for piece in self._pieces for n in tensors if piece.holds(n) is not None}
        tensors = {k: t for k, t in tensors.items() if k not in held}
        for defense in self._mimics:
            if not pruned and defense.traits(Traits(), self.anatomy).sparse:
                continue
            tensors = defense.mimic(tensors, self.like)
        return replace(
            self.like, tensors={k: t for k, t in tensors.items() if self.like.can_read(k)}
        )

    def objective(self) -> Objective | None:
        """Return the loss whose plain gradient `update` is, None where it is anything else."""
        if self.like.kind != "gradient" or self._step is not None or self._mimics:
            return None

        def loss(
            images: Tensor,
            labels: Tensor,
            generator: torch.Generator | None = None,
            shuffled: Tensor | None = None,
        ) -> Tensor:
            with self._prepared(generator, shuffled) as guard:
                return self._total(guard, images, labels)

        def parameters() -> dict[str, nn.Parameter]:
            weights = self._weights(self._guard())
            return {canonical_name(k): p for k, p in weights.items()}

        return Objective(parameters, loss)

    def random(self) -> bool:
        """Whether the model draws while it trains, whatever the defenses do: dropout, drop path."""
        self._guard()
        return self._random

    def _guard(self) -> Guard:
        if self._twin is None:
            known = [defense.known() for defense in self.defenses]
            model = copy.deepcopy(self.model).train()
            like = next(model.parameters())
            blank = like.new_zeros(2, self.anatomy.channels, *self.anatomy.image_size)
            try:
                self._random = draws_globally(model, blank)
            except Exception:  # noqa: BLE001 - it takes other images: seeding each pass costs time only
                self._random = True
            guard = protect(model, known, anatomy=self.anatomy)
            guard.release()  # what the twin makes never leaves
            state = guard.model.state_dict()
            state.update({k: v for k, v in self.extras.items() if k in state})
            guard.model.load_state_dict(state)
            self._twin = guard
            self._pieces = [m for m in guard.model.modules() if isinstance(m, Installed)]
        return self._twin

    @contextmanager
    def _prepared(
        self, generator: torch.Generator | None, shuffled: Tensor | None
    ) -> Iterator[Guard]:
        """Give the twin its source of draws and the positions known to be shuffled."""
        guard = self._guard()
        self._draws = generator or Draws().public_generator()
        guard.redraw(self._draws)
        for piece in self._pieces:
            piece.pin(shuffled)
        try:
            with rewinding(self._pieces):
                yield guard
        except BaseException:  # Ctrl-C too: the matching loop goes on to measure its best so far
            for piece in self._pieces:
                piece.abandon()
            raise
        finally:
            for piece in self._pieces:
                piece.pin(None)
                piece.key_examples(None)

    def _weights(self, guard: Guard) -> dict[str, nn.Parameter]:
        """Return the weights to differentiate by: all where clipping needs the whole norm."""
        if not self._known:  # once: looking names up costs milliseconds
            whole = self._step is not None or bool(self._mimics)
            self._known = {
                name: p
                for name, p in guard.model.named_parameters()
                if p.requires_grad and (whole or self.like.can_read(canonical_name(name)))
            }
        return self._known

    def _total(
        self,
        guard: Guard,
        images: Tensor,
        labels: Tensor,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        with self._seeded(guard.model):
            if weights is None:
                output = guard.model(images)
            else:
                output = torch.func.functional_call(guard.model, dict(weights), (images,))
            return self.loss(logits_of(output), labels) + guard.auxiliary_loss()

    def _seeded(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Draw dropout anew from this call's generator; a model without it is spared the cost."""
        if not self._random:
            return nullcontext()
        return seeded(int(torch.randint(2**62, (), generator=self._draws)), model)

    def _gradient(
        self,
        guard: Guard,
        images: Tensor,
        labels: Tensor,
        shuffled: Tensor | None,
        weights: Mapping[str, Tensor],
        *,
        moved: bool = False,
    ) -> dict[str, Tensor]:
        """Return one step's gradient by the model's own parameter names.

        It has a graph, which costs more than the gradient, where images or labels ask for one.

        Args:
            moved: Whether `weights` are not the model's own, after a local step.
        """
        given = weights if moved else None
        graph = images.requires_grad or labels.requires_grad

        def by_weight(total: Tensor) -> dict[str, Tensor]:
            gradients = torch.autograd.grad(
                total, list(weights.values()), create_graph=graph, materialize_grads=True
            )
            return dict(zip(weights, gradients, strict=True))

        if self._step is None:
            return by_weight(self._total(guard, images, labels, given))
        examples = []
        key = torch.randint(2**62, (1,), generator=self._draws)  # of a draw for the whole batch
        for i in range(len(images)):
            for piece in self._pieces:
                if piece.one_draw():
                    piece.key_examples(key)
                piece.pin(None if shuffled is None else shuffled[i : i + 1])
            total = self._total(guard, images[i : i + 1], labels[i : i + 1], given)
            examples.append(by_weight(total))
        return self._step.mimic(examples)

    def _difference(
        self, guard: Guard, images: Tensor, labels: Tensor, shuffled: Tensor | None
    ) -> dict[str, Tensor]:
        like = self.like
        training = LocalTraining.of(like)
        if training is None or training.learning_rate is None:
            raise NotApplicable(
                f"cannot simulate {like.optimizer} steps, only SGD, Adam and AdamW of a known rate"
            )
        start = {k: p for k, p in guard.model.named_parameters() if p.requires_grad}
        weights: dict[str, Tensor] = dict(start)
        state: dict[str, tuple[Tensor, ...]] = {}
        for step in range(1, like.local_steps + 1):
            gradients = self._gradient(guard, images, labels, shuffled, weights, moved=True)
            for name, gradient in gradients.items():
                if like.optimizer != "adamw":
                    gradient = gradient + like.weight_decay * weights[name]
                else:
                    shrunk = 1 - like.learning_rate * like.weight_decay  # type: ignore[operator]
                    weights[name] = shrunk * weights[name]
                if like.optimizer == "sgd":
                    before = state.get(name, ())
                    move = gradient + like.momentum * before[0] if before else gradient
                    state[name] = (move,)
                else:
                    state[name], move = _adam(state.get(name, (0.0, 0.0)), gradient, step)
                weights[name] = weights[name] - like.learning_rate * move  # type: ignore[operator]
            for piece in self._pieces:
                piece.stepped()
        return {k: weights[k] - start[k] for k in start}


def _adam(
    state: tuple[Tensor | float, ...], gradient: Tensor, step: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return Adam's next moments and its move per rate, with the defaults of torch.optim."""
    first = 0.9 * state[0] + 0.1 * gradient
    second = 0.999 * state[1] + 0.001 * gradient.square()
    least = torch.finfo(gradient.dtype).tiny  # the root of 0 has no derivative
    root = (second / (1 - 0.999**step)).clamp_min(least).sqrt()
    return (first, second), first / (1 - 0.9**step) / (root + 1e-8)
