"""Frozen stem: embedding and first blocks are not trained, so that nothing of them leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from vitguard.core import Traits
from vitguard.defenses.base import Defense, Draws, Installed, ModelDefense, traits_of
from vitguard.errors import Incompatible, Unprotected, expected
from vitguard.vit import Anatomy, canonical_name

__all__ = ["FrozenStem"]

_NORMS = ("norm_pre", "pre_layrnorm", "pre_layernorm")
"""What timm and transformers call a norm between the embedding and the first block."""


@dataclass(frozen=True)
class FrozenStem(ModelDefense):
    """Train the last blocks and the head alone; embedding, positions and earlier blocks stay.

    For fine-tuning: of random weights most would never be trained.

    Guarantees:
        No update shows a tensor of the embedding, the positions or a frozen block, nor of a norm
        between them; buffers, and what was added to the model later, included.
        The frozen parameters have no gradient, and a model in which one was unfrozen is refused.

    Does not protect against:
        Labels and class-token features, which stand in the gradient of the head: exactly of one
        image, and of a batch of fewer images than classes too. They tell whether an image is among
        candidates that the adversary has, and found another photo of the same thing (3.7 dB above
        the thumbnail); a decoder trained on public images draws colours and layout from them.
        A server that writes the weights. Where two blocks or more are trained 97 % of the patches
        stood in one update of two photos; where it is one block, all of them with mean pooling, and
        under a class token one patch of each image in a round, from the head alone as well
        (docs/malicious-server.md).
        `deep-tokens`, where a block that is trained shows all tokens of few images: with one block
        frozen of four it gave 127 dB; with mean pooling the last block alone shows every token.
        `containment`, from the last block alone under a class token as well, where its 2 heads + 1
        rows of attention give more equations than the image has pixels: 119 dB at 5 tokens of width
        64. `vitguard plan --train last-block/head` counts both.

    Args:
        trained: Last blocks that are trained, at least 0.

    References:
        docs/methods.md 4.5.
    """

    name: ClassVar[str] = "frozen-stem"
    trained: int = 1

    def __post_init__(self) -> None:
        if self.trained < 0:
            raise expected("trained of at least 0 blocks", self.trained)

    def audit_note(self) -> str:
        """Say what the head's gradient shows, whatever the attacks of an audit made of it."""
        return (
            f"{self.spec()} sends labels and class-token features: those name an image among "
            "candidates, found another photo of the same thing 3.7 dB above the thumbnail, and "
            "give a trained decoder colours and layout"
        )

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Raise Incompatible beside positions that are trained, or where nothing is left to."""
        if traits_of([d for d in stack if d is not self], anatomy).positions == "withheld":
            raise Incompatible(
                "Expected positions that are trained and withheld, or frozen with the stem, got "
                "both. Leave withheld out: what is frozen has no gradient."
            )
        frozen = self._beginnings(anatomy)
        rest = [n for n, p in model.named_parameters() if p.requires_grad and not _is(n, frozen)]
        if not rest:
            raise Incompatible(
                "Expected a parameter to train beside a frozen stem, got none. Give the model a "
                "head, or unfreeze one of its last blocks."
            )

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return what is not trained, and that positions are fixed and public."""
        positions = "fixed" if before.positions == "learnable" else before.positions
        frozen = (*before.frozen, *self._beginnings(anatomy))
        return replace(before, positions=positions, frozen=frozen)

    def install(self, model: nn.Module, anatomy: Anatomy, draws: Draws) -> Installed:
        """Freeze the parameters; values and names stay."""
        return _InstalledStem(model, self._beginnings(anatomy))

    def _beginnings(self, anatomy: Anatomy) -> tuple[str, ...]:
        blocks = anatomy.blocks[: max(len(anatomy.blocks) - self.trained, 0)]
        if self.trained == 0:  # the head alone: what shows it the tokens stays as well
            blocks += anatomy.readers
        alone = (anatomy.positions, *anatomy.prefix)
        parts = anatomy.patch_stage.split(".")
        above = ["".join(f"{p}." for p in parts[:i]) for i in range(len(parts))]
        return (
            *(n for n in alone if n is not None),
            *(a for a in above if a.endswith("embeddings.")),  # of transformers
            *(f"{a}{norm}." for a in above for norm in _NORMS),
            f"{anatomy.patch_stage}.",
            f"{anatomy.patch}.",
            *(f"{block.name}." for block in blocks),
        )


def _is(name: str, frozen: Sequence[str]) -> bool:
    known = Traits(frozen=(*frozen, *map(canonical_name, frozen)))
    return known.freezes(name) or known.freezes(canonical_name(name))


class _InstalledStem(Installed):
    watches_steps = True

    def __init__(self, model: nn.Module, frozen: tuple[str, ...]) -> None:
        super().__init__()
        self.frozen = frozen
        self.thawed = tuple(n for n, p in self._stem(model).items() if p.requires_grad)
        for parameter in self._stem(model).values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _stem(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {n: p for n, p in model.named_parameters() if _is(n, self.frozen)}

    def uninstall(self, model: nn.Module) -> None:
        for name, parameter in self._stem(model).items():
            parameter.requires_grad_(name in self.thawed)

    def holds(self, name: str) -> str | None:
        return "it belongs to the frozen stem" if _is(name, self.frozen) else None

    def moving(self, model: nn.Module) -> None:
        self.verify(model)

    def verify(self, model: nn.Module) -> None:
        loose = next((n for n, p in self._stem(model).items() if p.requires_grad), None)
        if loose is not None:
            raise Unprotected(
                f"Expected a frozen stem, got {loose}, which is trained. Freeze it again: "
                "parameter.requires_grad_(False); for more blocks protect with a larger trained=."
            )
