"""What an adversary is granted: Kerckhoffs' principle, spelled out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitguard.core import Loss, Normalization, Update, View
from vitguard.errors import expected
from vitguard.guard import Guard
from vitguard.selectors import several
from vitguard.threats.simulation import Simulation
from vitguard.vit import canonical_name

__all__ = ["CuriousServer", "Threat"]


class Threat(ABC):
    """An adversary: what it is granted of an update, and what a report says of it.

    Attributes:
        target: The client whose share of a sum it singles out by the weights that it hands to the
            others; "" for nobody.
        changing: Whether it hands out other weights each round, to read rounds together.
    """

    target: str = ""
    changing: bool = False

    def at(self, number: int, client: str = "") -> Threat:
        """Return the adversary as a client meets it in a round, by the number of the round."""
        return self

    @abstractmethod
    def view(
        self,
        guard: Guard,
        update: Update,
        normalization: Normalization,
        *,
        loss: Loss = F.cross_entropy,
    ) -> View:
        """Return what this adversary sees of `update`, made under `guard`."""

    def hand_out(self, guard: Guard) -> Mapping[str, Tensor] | None:
        """Return the weights that the client trains on, by name; None for the model's own.

        Args:
            guard: The model as the client protects it.
        """
        return None

    @abstractmethod
    def control(self) -> Threat:
        """Return the same adversary where everything is sent: it sees the undefended control."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what it was granted or denied, as JSON values for the report."""


@dataclass(frozen=True)
class CuriousServer(Threat):
    """A server, or a reader in transit, that sees the update and knows everything public.

    It knows architecture, weights before the step, loss, normalisation, batch size, local steps,
    and which defenses run with which settings. It does not know random draws or keys.

    Args:
        withhold: Selectors (`attention`, `mlp`, `patch`, `position`, `all` or a regular
            expression) of parameters that the client does not send; a lone one may be text.
    """

    withhold: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "withhold", several(self.withhold))

    def control(self) -> CuriousServer:
        """Return a server to which nothing is withheld."""
        return CuriousServer()

    def describe(self) -> dict[str, Any]:
        """Return the adversary and the selectors that are not sent."""
        return {"adversary": "curious server", "withheld": list(self.withhold)}

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
        simulation = Simulation(model, anatomy, guard.defenses, extras, update, loss)
        return View(
            model=model.eval(),
            update=update,
            image_shape=(anatomy.channels, *anatomy.image_size),
            normalization=normalization,
            classes=anatomy.classes,
            settings={d.name: d.settings() for d in guard.defenses},
            extras=extras,
            simulate=simulation.update,
            objective=simulation.objective(),
            random=simulation.random,
            traits=guard.traits,
        )


def _on_device(update: Update, device: torch.device) -> Update:
    """Put an update (from a file, say) where the model's weights are."""
    return replace(update, tensors={k: t.to(device) for k, t in update.tensors.items()})
