"""PRECODE: a variational bottleneck before the head, whose sampling hides the features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from recipes import Judged
from vitguard.defenses.base import Draws, Installed, ModelDefense
from vitguard.errors import expected
from vitguard.vit import Anatomy


@dataclass(frozen=True)
class Precode(ModelDefense):
    """Encode the features to a Gaussian, draw from it, decode the draw, and classify that.

    Guarantees:
        None: below the bottleneck every gradient is the plain one of the loss that was drawn.

    Args:
        size: Dimensions of the bottleneck.
        weight: Of the divergence from a standard normal in the loss.
    """

    name: ClassVar[str] = "precode"
    size: int = 64
    weight: float = 1e-3

    def __post_init__(self) -> None:
        if self.size < 1:
            raise expected("a bottleneck of at least 1 dimension", self.size)
        if not 0 <= self.weight < float("inf"):
            raise expected("a finite weight of at least 0", self.weight)

    def install(self, model: nn.Module, anatomy: Anatomy, draws: Draws) -> Installed:
        """Put the bottleneck before the head."""
        return _Bottleneck(model, anatomy, draws, self)


class _Bottleneck(Installed):
    def __init__(self, model: nn.Module, anatomy: Anatomy, draws: Draws, settings: Precode) -> None:
        super().__init__()
        self.draws, self.settings = draws, settings
        self.encoder = nn.Linear(anatomy.width, 2 * settings.size)
        self.decoder = nn.Linear(settings.size, anatomy.width)
        generator = draws.public_generator()
        for layer in (self.encoder, self.decoder):
            nn.init.trunc_normal_(layer.weight, std=0.05, generator=generator)
            nn.init.zeros_(layer.bias)
        self.divergence: tuple[Tensor, ...] = ()
        self.handles = [
            model.get_submodule(head).register_forward_pre_hook(_Pass(self))
            for head in anatomy.head
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "divergence": ()}

    def passed(self, features: Tensor) -> Tensor:
        mean, log = self.encoder(features).chunk(2, dim=-1)
        self.divergence = (0.5 * (mean.square() + log.exp() - log - 1).sum(-1),)
        drawn = mean
        if self.training:
            drawn = mean + (0.5 * log).exp() * self.draws.normal(mean.shape, like=mean)
        return self.decoder(drawn)

    def auxiliary_loss(self) -> Tensor | None:
        made = self.per_example_auxiliary()
        return None if made is None else made.mean()

    def per_example_auxiliary(self) -> Tensor | None:
        made, self.divergence = self.divergence, ()
        return self.settings.weight * made[0] if made else None

    def abandon(self) -> None:
        self.divergence = ()

    def uninstall(self, model: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()


class _Pass:
    def __init__(self, piece: _Bottleneck) -> None:
        self.piece = piece

    def __call__(self, module: nn.Module, args: Any) -> Any:
        return (self.piece.passed(args[0]), *args[1:])


JUDGED = Judged(
    title="PRECODE",
    place="features",
    source="Scheliga, Mäder, Seeland, arXiv:2108.04725",
    claim="A variational bottleneck in the model reduces the success rate of inversion to 0 %, "
    "with almost no loss of accuracy.",
    rebuilt="Features to the mean and deviation of 64 dimensions, a draw, and back to the head, as "
    "its last layers; the divergence has weight 0.001 in the loss.",
    threat="The draw is secret; the weights of the bottleneck are not.",
    stack=(Precode(),),
    attack="position",
    found="The draw changes the loss and not how a patch makes the gradient of the embedding: "
    "`position` never looks above it. (Balunović et al., arXiv:2111.04706, broke it by matching.)",
)
