"""What an attack is: a view in, a guess out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitguard.core import Guess, Normalization, View
from vitguard.errors import NotApplicable
from vitguard.released import Released, Remaining

__all__ = ["Attack", "InputAttack", "InputResult", "Rung", "Triptych", "guess_of"]


@dataclass(frozen=True)
class Rung:
    """Where an attack stands on the ladder, which tries the cheapest and surest first.

    Args:
        exact: Place among the rungs on an exact update.
        damaged: Place on a damaged one (noise, pruning, rounding, several local steps).
        instead_of: Rungs that need an exact update and that this one replaces on a damaged one.
            Where this one ran to its end, their refusal leaves nothing untried.
    """

    exact: int
    damaged: int
    instead_of: tuple[str, ...] = ()


class Attack(ABC):
    """One attack on an update. Subclasses are frozen dataclasses with the paper's defaults."""

    name: ClassVar[str]
    family: ClassVar[str]
    """`closed-form`, `ladder` or `matching`: what `--attack` can name as a group."""
    covers: ClassVar[tuple[str, ...]] = ()
    """Other families whose attacks this one runs as well."""

    rung: ClassVar[Rung | None] = None
    """Place on the ladder; None for an attack that is no rung of it."""

    proves_crafted: ClassVar[bool] = False
    """Whether its proofs hold on weights that the server crafted. A proof counts equations of
    weights in general position; on crafted ones a wrong patch may solve them all."""

    @abstractmethod
    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return a guess of the images behind `view.update`.

        Raises:
            NotApplicable: An assumption of the attack does not hold.
            Blocked: A tensor that the attack needs cannot be read.
        """

    def remains(self, plain: Released) -> tuple[Remaining, ...]:
        """Say what the attack can still do with an update of which some tensors cannot be read.

        What `vitguard plan` prints, and what `protect` refuses a selection for. Nothing by default:
        the attack makes no statement before it runs.
        """
        return ()

    def require(self, view: View) -> None:  # noqa: B027
        """Raise what `run` would raise on `view` before any work.

        A rung that the ladder's budget does not reach is asked this first: more of it would not
        help where an assumption does not hold.

        Raises:
            NotApplicable: As `run`.
            Blocked: As `run`.
        """

    def share(self, view: View) -> float:
        """Return the share of the ladder's work left that a rung may use on `view`; 0 to skip it.

        It becomes the rung's `seconds`, where it has such a setting.
        """
        return 1.0

    def least(self, view: View) -> float:
        """Return the nominal seconds of work below which a rung cannot give anything."""
        return 0.0

    def parts(self) -> Mapping[str, Attack]:
        """Return the attacks that this one tries in turn, by name; none for a single attack.

        What each of them did stands in `details["outcomes"]` of the guess: `ran`, `cut` (by the
        budget), `bounded` (cut, where by proof next to nothing was to be had), `blocked` (a tensor
        cannot be read), `refused` (an assumption does not hold) or `failed` (it broke).
        """
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, for the report."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


def guess_of(attack: Attack, view: View, generator: torch.Generator) -> Guess:
    """Return what an attack returns, with what it verified only where that is a proof.

    Raises:
        NotApplicable: As `Attack.run`, or the craft let no image give a gradient.
        Blocked: As `Attack.run`.
    """
    if view.crafted is not None and view.crafted.nothing:
        raise NotApplicable(view.crafted.nothing)
    guess = attack.run(view, generator)
    if view.crafted is None or attack.proves_crafted or guess.verified is None:
        return guess
    details = {k: v for k, v in guess.details.items() if k != "verified"}
    details["unproved"] = "the weights are crafted: wrong patches may solve the same equations"
    return replace(guess, verified=None, details=details)


@dataclass(frozen=True)
class Triptych:
    """One attacked example: image, what was added, and the result, with what the model says.

    Args:
        image, adversarial: Pixels in [0, 1], shape (channels, height, width).
        epsilon: Bound on the change, in pixel units.
        label: True class, or the class aimed at by a targeted attack.
        before, after: (class, confidence) of the model on each image.
    """

    image: Tensor
    adversarial: Tensor
    epsilon: float
    label: int
    before: tuple[int, float]
    after: tuple[int, float]

    @property
    def perturbation(self) -> Tensor:
        """What was added, in pixel units."""
        return self.adversarial - self.image

    @property
    def gain(self) -> float:
        """How much `magnified` enlarges the perturbation: epsilon becomes half the range."""
        return 0.5 / self.epsilon if self.epsilon else 1.0

    @property
    def magnified(self) -> Tensor:
        """The perturbation times `gain` around mid-grey, pixels in [0, 1]."""
        return (0.5 + self.gain * self.perturbation).clamp(0, 1)


@dataclass(frozen=True)
class InputResult:
    """What an attack on the input did to a batch.

    Args:
        clean_accuracy: Share of the batch classified right, in [0, 1].
        robust_accuracy: The same under the attack, by epsilon.
        target_hits: For a targeted attack, the share driven to its target, by epsilon.
        examples: Some examples at the largest epsilon.
        details: Plain facts for the report; JSON values only.
    """

    clean_accuracy: float
    robust_accuracy: Mapping[float, float]
    target_hits: Mapping[float, float] = field(default_factory=dict)
    examples: tuple[Triptych, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class InputAttack(ABC):
    """One attack on the input of a trained model rather than on an update."""

    name: ClassVar[str]
    family: ClassVar[str] = "input"
    covers: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        normalization: Normalization | None = None,
        generator: torch.Generator | None = None,
    ) -> InputResult:
        """Attack `images`, pixels in [0, 1] of shape (batch, channels, height, width).

        Args:
            labels: True classes, shape (batch,).
            normalization: From pixels to the model's input; None for a model that takes pixels.
            generator: For random targets and the like.
        """

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, for the report."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
