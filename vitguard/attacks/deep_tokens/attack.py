"""Deep tokens: one plain MLP gives an image away, whatever the layers before it send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.budget import Budget, CutShort, charge, worked
from vitguard.attacks.cascade.separate import LastBlock
from vitguard.attacks.deep_tokens.search import find_tokens, search_seconds
from vitguard.attacks.deep_tokens.stem import ROUGH, Stem
from vitguard.attacks.equations.counts import gelu_span_remains, token_search_remains
from vitguard.attacks.equations.rows import guess_from_patches
from vitguard.attacks.evidence import require_finite
from vitguard.attacks.labels import try_labels
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable, expected
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy

__all__ = ["DeepTokens"]

_ORDERS = 4  # orders that are tried, each from the image that fits the last one roughly
_DRAWS = 256  # images of the prior that starts and positions are read from
_TELL, _SHARP = 1e-3, 1e-6  # of the largest variance, below which no direction counts as sharper
_EXACT, _FITS = 1e-3, 1e-2  # relative miss of every token: proved, and at least fitted
_STEEP = 0.1  # of that miss times the condition of the patch embedding, in a proof


@dataclass(frozen=True)
class DeepTokens(Attack):
    """Find the tokens that enter the MLP of one block, then invert the public blocks below.

    A true token's norm output l lies in the row space of dL/dW_fc1 of its block, and act(W1 l + b1)
    in that of dL/dW_fc2: T unknowns in hidden - T equations. Levenberg-Marquardt starts at tokens
    of images drawn from a natural-image prior; each token found is taken out of both gradients, so
    that all are found in some T / 10 rounds. They are told their positions by the distance to what
    stands there in such images. The image is the one whose tokens these are, by Gauss-Newton
    through the known blocks below, under the prior, which gives way.

    Reads the two MLP layers of one block and nothing else: no patch embedding, position or
    attention gradient.

    Guarantees:
        All patches are marked `verified` where every token was found (`accept`), the image
        makes every one of them to 1e-3, and to so much less that the patch embedding, inverted,
        does not turn the miss into a tenth of a patch; else none is, and never where a patch has
        more pixels than a token has numbers.

    Args:
        seconds: Budget of work, in nominal seconds (`Budget`).
        accept: Relative residual below which a token counts as found; 30 times as much where its
            gradient solves the equations of both layers as no other vector does.

    Raises:
        NotApplicable: A batch, a shuffle, several steps, T >= D, a block whose rows do not span the
            tokens, or no token found.
        Blocked: No block has both MLP layers readable.

    References:
        docs/methods.md 2.5e.
    """

    name: ClassVar[str] = "deep-tokens"
    family: ClassVar[str] = "ladder"
    rung: ClassVar[Rung | None] = Rung(45, 75)
    seconds: float = 60.0
    accept: float = 1e-4

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise expected("seconds above 0", self.seconds)
        if not 0 < self.accept < 1e-2:
            raise expected("accept between 0 and 0.01", self.accept)

    def share(self, view: View) -> float:
        """Return the share of the ladder's work left; none where `gelu-span` reads block 0."""
        anatomy = Anatomy.of(view.model)
        if view.update.batch_size > 1 or not anatomy.blocks:
            return 0.0
        return 0.0 if gelu_span_remains(_released(view, anatomy)).possible else 0.8

    def least(self, view: View) -> float:
        """Return about how many nominal seconds the search for the tokens takes."""
        anatomy = Anatomy.of(view.model)
        return search_seconds(anatomy.tokens, 4 * anatomy.width)

    def require(self, view: View) -> None:
        """Find a block to read."""
        _block(view, Anatomy.of(view.model))

    def remains(self, plain: Released) -> tuple[Remaining, ...]:
        """Name the first block whose two MLP layers are plain and span all tokens."""
        return (token_search_remains(plain),)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return one image."""
        budget, before = Budget.of(self.seconds), worked()
        view = view.gradient()
        anatomy = Anatomy.of(view.model)
        number = _block(view, anatomy)
        require_finite(view)
        block = anatomy.blocks[number]
        stem = Stem(view, anatomy, number)
        problem = LastBlock.at(view, block, anatomy.tokens, torch.ones(1, dtype=torch.float64))
        natural = stem.natural(_DRAWS, generator)
        found = find_tokens(problem, natural.flatten(0, 1), budget, self.accept, generator)
        if not len(found):
            raise (CutShort if budget.over else NotApplicable)(
                f"no token of block {number} was found"
            )
        if stem.fit_seconds > budget.left:
            raise CutShort(f"to invert all below the MLP of block {number} exceeds the budget")
        back = found @ problem.inner.T
        tokens, known, sharp = _ordered(back, natural)
        white, settled = None, False
        for _ in range(_ORDERS):
            white = stem.invert(tokens, known, budget, start=white, down_to=ROUGH)
            again, known = _assigned(stem.made(white), back, sharp)
            settled = bool(torch.equal(again[known], tokens[known]))
            tokens = again
            if settled or budget.over:
                break
        white = stem.invert(tokens, known, budget, start=white)
        image, made = stem.image(white), stem.made(white)
        gap = (made - tokens).norm(dim=1) / tokens.norm(dim=1).clamp_min(1e-300)
        worst = float(gap[known].max())
        exact = worst < min(_EXACT, _STEEP / _condition(view, anatomy))
        proved = bool(known.all()) and exact and anatomy.patch_pixels <= anatomy.width - 2
        left = {
            "all tokens were found": len(found) < anatomy.tokens,
            "their order was settled": not settled,
            "the image made its tokens": worst > _FITS,
            "the blocks below were inverted (budget)": budget.over,
        }
        patches = anatomy.patchify(image[None])
        details = {
            "block": number,
            "tokens": anatomy.tokens,
            "found": len(found),
            "residual": worst,
            "seconds": round(1e-9 * (worked() - before), 2),
        }
        if not proved and any(left.values()):
            details["unfinished"] = [what for what, missing in left.items() if missing]
        verified = torch.full((1, anatomy.patches), proved, device=patches.device)
        return guess_from_patches(
            view, anatomy, patches, labels=try_labels(view, generator), verified=verified,
            details=details,
        )  # fmt: skip


def _released(view: View, anatomy: Anatomy) -> Released:
    """Return what of the update can be read."""
    sizes = {name: tensor.numel() for name, tensor in view.update.tensors.items()}
    plain = frozenset(name for name in sizes if view.update.can_read(name))
    return Released(anatomy, sizes, plain, view.traits)


def _block(view: View, anatomy: Anatomy) -> int:
    """Return the number of the first block that can be read, or say why there is none."""
    if view.update.batch_size > 1:
        raise NotApplicable("a batch: which token is of which image is not known")
    if view.traits.shuffle is not None:
        raise NotApplicable("the order of shuffled patches is not in the tokens")
    if anatomy.tokens >= anatomy.width:
        raise NotApplicable(
            f"{anatomy.tokens} tokens fill the spans of width {anatomy.width}: "
            "no exact attack known"
        )
    plain = _released(view, anatomy)
    wanted: tuple[str, ...] = ()
    for number, block in enumerate(anatomy.blocks):
        if not block.pre_norm or block.gated or block not in plain.spanning:
            continue
        hidden = plain.hidden(f"{block.fc1}.weight", f"{block.fc2}.weight")
        if not hidden:
            return number
        wanted = wanted or hidden
    if wanted:
        raise Blocked(wanted[0], "no block whose rows span the tokens has both MLP layers plain")
    if not anatomy.blocks:
        raise NotApplicable("no block is known")
    raise NotApplicable(
        "no block with a norm in front and an ungated MLP has rows that span the tokens"
    )


def _condition(view: View, anatomy: Anatomy) -> float:
    """Return the condition number of the patch embedding: how much it may enlarge a miss."""
    weight = view.weight(anatomy.patch_weight).flatten(1)
    values = torch.linalg.svdvals(weight)
    return float(values[0] / values[-1].clamp_min(1e-300 * values[0]))


def _ordered(found: Tensor, natural: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a token for each position, which positions have one, and a map that whitens tokens.

    By assignment of the least distance to the mean token of each position, whitened by what varies
    among natural images: roughly here, and sharply in the map, for images that nearly fit.
    """
    mean = natural.mean(0)
    spread = (natural - mean).flatten(0, 1)
    charge(qr=2 * spread.shape[1] ** 3, products=2.0 * spread.numel() * spread.shape[1])
    values, vectors = torch.linalg.eigh(spread.T @ spread / len(spread))

    def whitening(floor: float) -> Tensor:
        return vectors / values.clamp_min(floor * values[-1]).sqrt()

    return *_assigned(mean, found, whitening(_TELL)), whitening(_SHARP)


def _assigned(like: Tensor, found: Tensor, tell: Tensor) -> tuple[Tensor, Tensor]:
    """Return a token for each position, and which have one: those least far from `like` in all."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(like @ tell, found @ tell).square()
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    tokens, known = like.clone(), torch.zeros(len(like), dtype=torch.bool, device=like.device)
    tokens[rows], known[rows] = found[columns], True
    return tokens, known
