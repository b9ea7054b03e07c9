"""What a craft is: honest weights in, crafted weights of the same architecture out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitguard.core import Crafted, Traits, Update

__all__ = ["Craft"]


class Craft(ABC):
    """One way to write weights that make an update tell more. Subclasses are frozen dataclasses.

    A craft reads the public model and its own settings, never an image of the victim. An equal
    generator gives equal weights.
    """

    name: ClassVar[str]

    @abstractmethod
    def weights(
        self, model: nn.Module, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return a state dict with the keys, shapes and dtypes of the model's own.

        Args:
            model: The public model with honest weights; it is not changed.
            generator: For the craft's own draws; a fixed seed by default.

        Raises:
            NotApplicable: The architecture leaves no place for the craft.
        """

    def under(self, traits: Traits) -> Craft:
        """Return what the server writes for clients whose defenses make `traits` true."""
        return self

    def turned(self, turn: int) -> Craft:
        """Return what the server writes in round `turn` where it changes its craft by the round.

        Turn 0 is the craft itself; a craft that has nothing to change stays as it is.
        """
        return self

    def crafted(self, model: nn.Module) -> Crafted:
        """Return what the server knows of the weights that it wrote, for `View.crafted`."""
        return Crafted(self.name, self.settings())

    def seen(self, update: Update, model: nn.Module) -> Update:
        """Return an update as the server reads it, who knows which images gave a gradient."""
        return update

    def nothing(self, update: Update, model: nn.Module) -> str:
        """Return why an update shows nothing of any image, "" where it does, or does not tell."""
        return ""

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, for the report."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
