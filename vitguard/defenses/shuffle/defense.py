"""Masked patch shuffle: some patches change places and lose their position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from vitguard.core import Shuffle, Traits
from vitguard.defenses.base import Defense, Draws, Installed, ModelDefense
from vitguard.defenses.shuffle.installed import InstalledShuffle
from vitguard.defenses.shuffle.settings import ShuffleSettings
from vitguard.errors import Incompatible
from vitguard.vit import Anatomy

__all__ = ["PatchShuffle"]


@dataclass(frozen=True)
class PatchShuffle(ShuffleSettings, ModelDefense):
    """Permute a share of the patches among themselves and give them one unknown position (MJP).

    While the model trains, the masked patches of each image are permuted among the masked slots,
    and their position embedding is replaced by a learnable one that they share. The others keep
    patch and position; class and register tokens are never touched. On a model without absolute
    positions (Swin, rotary positions) the shared embedding marks the shuffled tokens, and the
    relative positions of the slots stay.

    Guarantees:
        The output is a permutation of the patches inside the mask and the identity outside.
        Exactly the masked slots get the unknown embedding, and their own position embedding
        gets no gradient.
        In eval mode the output is that of the model without it, bit for bit.
        No draw depends on the pixels or, with `draw="image"`, on the other images of the batch.

    Does not protect against:
        Reading the mask: rows of zeros in the gradient of learnable positions, or the residual of
        span inversion with fixed ones, tell which patches were shuffled.
        Reading the content: the order of the masked patches is hidden, not what they show. At
        batch size 1 `gelu-span` recovers it. See docs/shuffle.md.

    Args:
        ratio: Share of the patches in [0, 1]. The papers train with 0.1 and show 0.7; small
            ratios hide little, because the smoothest image fills the gaps.
        mask: `blockwise` (BEiT's rectangles, at most floor(ratio N) patches) or `uniform`
            (exactly floor(ratio N)).
        draw: A mask and permutation per `image`, or one per `batch`.
        derangement: No masked patch stays in its place (a single cycle; a lone patch stays).
        probability: Chance in [0, 1] that an image (or batch) is shuffled at all.
        warmup: Optimizer steps without a shuffle; updates of those steps are not protected.
        schedule: How the ratio goes from 0 to `ratio` between `warmup` and `steps`: at once
            (`constant`), `linear` or `cosine`.
        steps: Optimizer steps at which schedules end; 0 for a constant DAL weight.
        dal: Dense absolute localization, an L1 loss on (row, column) predicted for the patches
            that were not shuffled: from their position embeddings (`positions`, the papers' code)
            or from their output tokens (`tokens`). Add `guard.auxiliary_loss()` to the loss.
        dal_head: `linear`, `mlp`, or `pca` (no parameters).
        dal_weight, dal_final: Weight of that loss after its linear rise over `warmup`, and at the
            end of its cosine decay at `steps`.

    Raises:
        InputError: A setting out of range.
        Incompatible: DAL over positions that are fixed or missing; DAL over tokens of a model
            whose tokens are merged or dropped on the way.

    References:
        arXiv 2205.12551, 2601.12051; block-wise masks arXiv 2106.08254.

    Examples:
        >>> import timm, torch, vitguard as vg
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> guard = vg.protect(model, [vg.PatchShuffle(ratio=0.5, mask="uniform")])
        >>> _ = model(torch.rand(2, 3, 224, 224))
        >>> guard.truth()["shuffled"].sum(1).tolist()
        [98, 98]
        >>> guard.remove()
    """

    name: ClassVar[str] = "shuffle"

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Raise Incompatible where shuffle or DAL would have nothing to act on."""
        if anatomy.patches < 1:
            raise Incompatible(f"Expected a model with patches to shuffle, got {anatomy.patches}.")
        if anatomy.positions is not None and anatomy.embedded is None:
            raise Incompatible(
                "Expected to know which module takes the embedded sequence, got "
                "Anatomy.embedded=None. Give it in the Anatomy."
            )
        if odd := next((o for o in anatomy.obstacles if "position embedding" in o), None):
            raise Incompatible(
                f"Expected one position embedding per patch to replace, got {odd}. "
                "Use another model."
            )
        if self.dal == "positions":
            _require_learnable_positions(model, anatomy, stack)
        if self.dal == "tokens":
            _require_every_token(model, anatomy)

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return how many patches move at most, and which embedding they get."""
        always = self.probability == 1 and self.schedule == "constant" and not self.warmup
        shuffle = Shuffle(
            most=int(self.ratio * anatomy.patches + 1e-9),
            exactly=always and self.mask == "uniform",
            per_batch=self.draw == "batch",
            unknown=f"vitguard.{self.name}.unknown",
        )
        return replace(before, shuffle=shuffle)

    def install(self, model: nn.Module, anatomy: Anatomy, draws: Draws) -> Installed:
        """Hook the patch embedding and the embedded sequence."""
        return InstalledShuffle(model, anatomy, draws, self)


def _require_learnable_positions(
    model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]
) -> None:
    fixed = next(
        (d for d in stack if d.traits(Traits(), anatomy).positions in ("fixed", "none")), None
    )
    learnable = anatomy.positions in {n for n, p in model.named_parameters() if p.requires_grad}
    if fixed is not None or not learnable:
        got = repr(fixed) if fixed is not None else "a model without them"
        raise Incompatible(
            f"Expected learnable positions for dal='positions', got {got}. Use dal='tokens', "
            "which has the body of the model to train."
        )


def _require_every_token(model: nn.Module, anatomy: Anatomy) -> None:
    problem = next((o for o in anatomy.obstacles if "dropout" in o), None)
    if not anatomy.blocks:
        problem = "no blocks in its Anatomy"
    else:
        norm = dict(model.named_modules()).get(anatomy.blocks[-1].norm2)
        scale = getattr(norm, "weight", None)
        if scale is not None and scale.numel() != anatomy.width:
            problem = f"tokens of width {scale.numel()} instead of {anatomy.width} at the end"
    if problem:
        raise Incompatible(
            "Expected the same patches in the last block as in the first for dal='tokens', got "
            f"{problem}. Leave DAL out."
        )
