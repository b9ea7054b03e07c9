"""A server that writes the weights before clients train on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.core import Loss, Normalization, Update, View
from vitguard.defenses.base import written
from vitguard.discovery import discover
from vitguard.errors import NotApplicable, expected
from vitguard.guard import Guard
from vitguard.registry import parse_one
from vitguard.selectors import several
from vitguard.threats.crafts.base import Craft
from vitguard.threats.curious_server import CuriousServer, Threat
from vitguard.vit import canonical_name

__all__ = ["MaliciousServer", "craft_types", "parse_craft", "parse_threat"]


@cache
def craft_types() -> dict[str, type[Craft]]:
    """Return every craft by name, in alphabetical order."""
    return discover("vitguard.threats.crafts", Craft)


def parse_craft(spec: str) -> Craft:
    """Read one craft such as `imprint:blocks=2`.

    Raises:
        InputError: An unknown name or key, or a value that the craft refuses.
    """
    return parse_one(spec, craft_types(), "craft")


def parse_threat(spec: str, withhold: Sequence[str] = ()) -> Threat:
    """Read `curious`, `malicious` or `malicious:craft=NAME[:key=value,...]`.

    Args:
        withhold: Selectors of parameters that the client does not send.

    Raises:
        InputError: Another threat, or a craft that is refused.
    """
    kind, _, rest = spec.strip().partition(":")
    key, _, craft = rest.partition("=")
    if kind == "curious" and not rest:
        return CuriousServer(several(withhold))
    if kind == "malicious" and not rest:
        return MaliciousServer(withhold=several(withhold))
    if kind == "malicious" and key == "craft":
        return MaliciousServer(parse_craft(craft), withhold=several(withhold))
    raise expected("curious, malicious or malicious:craft=NAME[:key=value,...]", repr(spec))


@dataclass(frozen=True)
class MaliciousServer(Threat):
    """A server that hands out weights of its own making, and reads the updates that they give.

    The architecture, the names, the shapes and the dtypes stay as they are. The victim trains on
    these weights under its defenses. The server knows what a curious server knows, and what it
    wrote. The undefended control trains on the same crafted weights.

    Args:
        craft: What it writes, or its name with settings (`"imprint:blocks=2"`).
        withhold: As for `CuriousServer`.
        target: In rounds: the client that gets `craft`, or honest weights where that is
            `suppression`. All others get `suppression`, zeros before the head, so that the sum is
            the target's share alone. "" hands the same weights to all.
        changing: In rounds: whether each round has its own turn of the craft (`Craft.turned`).

    Raises:
        InputError: No such craft.
    """

    craft: Craft | str = "imprint"
    withhold: Sequence[str] = ()
    target: str = ""
    changing: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.craft, str):
            object.__setattr__(self, "craft", parse_craft(self.craft))
        elif not isinstance(self.craft, Craft):
            raise expected("a craft, or its name", repr(self.craft))
        object.__setattr__(self, "withhold", several(self.withhold))

    @property
    def made(self) -> Craft:
        """The craft."""
        assert isinstance(self.craft, Craft)
        return self.craft

    def at(self, number: int, client: str = "") -> Threat:
        """Return the server of one round and client: what it writes there, the same for all."""
        craft = self.made.turned(number) if self.changing else self.made
        if self.target and client != self.target:
            craft = parse_craft("suppression")
        elif self.target and craft.name == "suppression":
            return CuriousServer(self.withhold)
        return MaliciousServer(craft, self.withhold)

    def control(self) -> MaliciousServer:
        """Return the same server where everything is sent."""
        return replace(self, withhold=())

    def describe(self) -> dict[str, Any]:
        """Return the adversary, its craft, and the selectors that are not sent."""
        settings = [f"{key}={written(value)}" for key, value in self.made.settings().items()]
        craft = ":".join(part for part in (self.made.name, ",".join(settings)) if part)
        told: dict[str, Any] = {"adversary": "malicious server", "craft": craft}
        if self.target:
            told["target"] = self.target
        if self.changing:
            told["changing"] = "by the round"
        return {**told, "withheld": list(self.withhold)}

    def hand_out(self, guard: Guard) -> dict[str, Tensor]:
        """Return crafted weights for the model as the client protects it.

        The defenses and their settings are public, so that the server knows fixed positions, say.

        Raises:
            NotApplicable: The craft does not fit the model.
        """
        try:
            craft = self.made.under(guard.traits)
            return craft.weights(_public(craft, guard))
        except NotApplicable as error:
            raise NotApplicable(
                f"Expected a model that the craft {self.made.name} can be written into, got one "
                f"that it does not fit: {error}. Audit another craft, or a model that it fits."
            ) from error

    def view(
        self,
        guard: Guard,
        update: Update,
        normalization: Normalization,
        *,
        loss: Loss = F.cross_entropy,
    ) -> View:
        """Return what a curious server sees, and what this one wrote."""
        craft = self.made.under(guard.traits)
        model = _public(craft, guard)
        crafted = replace(craft.crafted(model), nothing=craft.nothing(update, model))
        update = craft.seen(update, model)
        seen = CuriousServer(self.withhold).view(guard, update, normalization, loss=loss)
        return replace(seen, crafted=crafted)


def _public(craft: Craft, guard: Guard) -> nn.Module:
    """Return the public model as the craft takes it: what the defenses freeze is frozen in it.

    Where nothing that is left to train has room for the craft the model is as without defenses: the
    craft is written where no update shows it.
    """
    model = guard.public_model()
    for name, parameter in model.named_parameters():
        if guard.traits.freezes(name) or guard.traits.freezes(canonical_name(name)):
            parameter.requires_grad_(False)
    try:
        craft.crafted(model)
    except NotApplicable:
        return guard.public_model()
    return model
