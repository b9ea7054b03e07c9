"""Representation noise: Gaussian noise on the embedded tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from recipes import Judged
from vitguard.defenses.base import Draws, Installed, ModelDefense
from vitguard.errors import Unprotected, expected
from vitguard.vit import Anatomy


@dataclass(frozen=True)
class TokenNoise(ModelDefense):
    """Add Gaussian noise to the embedded tokens while the model trains.

    Guarantees:
        None: patches enter the gradient of the embedding without the noise.

    Args:
        scale: Standard deviation over the root mean square of the tokens, at least 0.
    """

    name: ClassVar[str] = "token-noise"
    scale: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise expected("a finite scale of at least 0", self.scale)

    def install(self, model: nn.Module, anatomy: Anatomy, draws: Draws) -> Installed:
        """Hook the module that takes the embedded sequence."""
        return _Noise(model, anatomy, draws, self.scale)


class _Noise(Installed):
    def __init__(self, model: nn.Module, anatomy: Anatomy, draws: Draws, scale: float) -> None:
        super().__init__()
        if anatomy.embedded is None:
            raise Unprotected("Expected to know what takes the embedded sequence, got None.")
        self.draws, self.scale = draws, scale
        entered = model.get_submodule(anatomy.embedded)
        self.handle = entered.register_forward_pre_hook(_Add(self))

    def noised(self, tokens: Tensor) -> Tensor:
        size = self.scale * tokens.detach().square().mean().sqrt()
        return tokens + size * self.draws.normal(tokens.shape, like=tokens)

    def uninstall(self, model: nn.Module) -> None:
        self.handle.remove()


class _Add:
    def __init__(self, piece: _Noise) -> None:
        self.piece = piece

    def __call__(self, module: nn.Module, args: Any) -> Any:
        return (self.piece.noised(args[0]), *args[1:]) if self.piece.training else None


JUDGED = Judged(
    title="Representation noise",
    place="features",
    source="a usual baseline (feature perturbation); no single paper",
    claim="Noise on the representation that gradients are taken of hides the input.",
    rebuilt="Gaussian noise of half the tokens' root mean square on the embedded sequence, in "
    "every training pass.",
    threat="The noise is a secret draw.",
    stack=(TokenNoise(),),
    attack="position",
    found="Noise behind the embedding is a constant to it: the gradients of positions and patches "
    "are those of the true patches, and `position` solves them.",
)
