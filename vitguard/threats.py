"""What the adversary is granted: Kerckhoffs' principle, spelled out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.core import Loss, Normalization, Objective, Update, View
from vitguard.defenses._base import Defense
from vitguard.errors import NotApplicable, expected
from vitguard.guard import Guard, protect
from vitguard.vit import Anatomy, canonical_name, canonical_parameters, logits_of, math_attention

__all__ = ["CuriousServer"]


@dataclass(frozen=True)
class CuriousServer:
    """A server, or a reader in transit, that sees the update and knows everything public.

    It knows architecture, weights before the step, loss, normalisation, batch size, local steps,
    and which defenses run with which settings. It does not know random draws or keys.

    Args:
        withhold: Selectors (`attention`, `mlp`, `patch`, `position`, `all` or a regular
            expression) of parameters that the client does not send.
    """

    withhold: tuple[str, ...] = ()

    def view(
        self,
        guard: Guard,
        update: Update,
        normalization: Normalization,
        *,
        loss: Loss = F.cross_entropy,
    ) -> View:
        """Return what this adversary sees of `update`, made under `guard`.

        Raises:
            InputError: A selector of `withhold` names nothing.
        """
        anatomy = guard.anatomy
        model = guard.public_model()
        names = [canonical_name(name) for name, _ in model.named_parameters()]
        held = {}
        for selector in self.withhold:
            chosen = anatomy.select(selector, names)
            if not chosen:
                raise expected("parameters to withhold", f"none called {selector!r} in this model")
            held |= {n: f"withheld by --withhold {selector}" for n in chosen if update.can_read(n)}
        update = _on_device(update.seal(held), next(model.parameters()).device)
        extras = guard.extras()
        simulate, objective = simulator(model, anatomy, guard.defenses, extras, update, loss)
        return View(
            model=model.eval(),
            update=update,
            image_shape=(anatomy.channels, *anatomy.image_size),
            normalization=normalization,
            classes=anatomy.classes,
            settings={d.name: d.settings() for d in guard.defenses},
            extras=extras,
            simulate=simulate,
            objective=objective if update.kind == "gradient" else None,
        )


def _on_device(update: Update, device: torch.device) -> Update:
    """Put an update (from a file, say) where the model's weights are."""
    return replace(update, tensors={k: t.to(device) for k, t in update.tensors.items()})


def simulator(
    model: nn.Module,
    anatomy: Anatomy,
    defenses: tuple[Defense, ...],
    extras: dict[str, Tensor],
    like: Update,
    loss: Loss,
) -> tuple[Callable[[Tensor, Tensor, torch.Generator | None], Update], Objective]:
    """Return what simulates the update of dummy images under the settings the adversary knows.

    Draws of the defenses come from the generator given to each call. Only tensors that `like` can
    read are returned, as a gradient or as the difference of as many plain SGD steps. The second
    value is the loss behind one gradient.
    """
    twin: list[tuple[Guard, dict[str, nn.Parameter]]] = []

    def build() -> tuple[Guard, dict[str, nn.Parameter]]:
        known = [defense.known() for defense in defenses]
        guard = protect(copy.deepcopy(model).train(), known, anatomy=anatomy)
        guard.release()  # what the twin makes never leaves
        state = guard.model.state_dict()
        state.update({k: v for k, v in extras.items() if k in state})
        guard.model.load_state_dict(state)
        names = canonical_parameters(guard.model)  # once: looking them up costs milliseconds
        return guard, {k: p for k, p in names.items() if like.can_read(k)}

    def own() -> tuple[Guard, dict[str, nn.Parameter]]:
        if not twin:
            twin.append(build())
        return twin[0]

    def objective(
        images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        guard, _ = own()
        guard.redraw(generator)
        return loss(logits_of(guard.model(images)), labels) + guard.auxiliary_loss()

    def simulate(
        images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Update:
        guard, parameters = own()
        guard.redraw(generator)
        if like.kind == "difference":
            return _difference(guard, images, labels, like, loss)
        with math_attention():
            total = objective(images, labels, generator)
            gradients = torch.autograd.grad(
                total, list(parameters.values()), create_graph=True, materialize_grads=True
            )
        return replace(like, tensors=dict(zip(parameters, gradients, strict=True)))

    return simulate, Objective(lambda: own()[1], objective)


def _difference(guard: Guard, images: Tensor, labels: Tensor, like: Update, loss: Loss) -> Update:
    if like.optimizer != "sgd" or like.learning_rate is None:
        raise NotApplicable(
            f"cannot simulate {like.optimizer} steps, only plain SGD with a known rate"
        )
    names = [k for k, p in guard.model.named_parameters() if p.requires_grad]
    start = {k: p for k, p in guard.model.named_parameters() if p.requires_grad}
    weights: dict[str, Tensor] = dict(start)
    velocity: dict[str, Tensor] = {}
    for _ in range(like.local_steps):
        with math_attention():
            output = torch.func.functional_call(guard.model, weights, (images,))
            total = loss(logits_of(output), labels) + guard.auxiliary_loss()
            gradients = torch.autograd.grad(
                total, [weights[k] for k in names], create_graph=True, materialize_grads=True
            )
        for name, gradient in zip(names, gradients, strict=True):
            step = gradient + like.weight_decay * weights[name]
            if like.momentum:
                step = step + like.momentum * velocity[name] if name in velocity else step
                velocity[name] = step
            weights[name] = weights[name] - like.learning_rate * step
    tensors = {canonical_name(k): weights[k] - start[k] for k in names}
    return replace(like, tensors={k: v for k, v in tensors.items() if like.can_read(k)})
