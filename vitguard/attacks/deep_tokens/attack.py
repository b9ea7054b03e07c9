"""Deep tokens: frozen or hidden first blocks do not hide an image that a later block has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.budget import Budget, CutShort, charge, worked
from vitguard.attacks.cascade.separate import LastBlock, descend
from vitguard.attacks.deep_tokens.stem import Stem
from vitguard.attacks.equations.counts import token_search_remains
from vitguard.attacks.equations.rows import guess_from_patches
from vitguard.attacks.evidence import require_finite
from vitguard.attacks.labels import try_labels
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable, expected
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy

__all__ = ["DeepTokens"]

_JACOBIANS = 6  # that an inversion takes at least
_ORDERS = 4  # orders that are tried, each from the image that fits the last one roughly
_ROUGH = 1e-2  # weight of the prior in those
_DRAWS = 256  # images of the prior that starts and positions are read from
_STARTS = 64  # of a round
_PATIENCE = 4  # rounds without a new token
_SAME = 1e-2  # relative distance below which two tokens are one
_FLOOR = 1e-3  # of the largest variance, under which whitening counts no direction as sharper
_WIDE = 4096  # pixels of an image: above, the Jacobian of the stem does not fit


@dataclass(frozen=True)
class DeepTokens(Attack):
    """Find the tokens that enter the MLP of a later block, then invert the public blocks below.

    A true token's norm output l lies in the row space of dL/dW_fc1 of its block, and act(W1 l + b1)
    in that of dL/dW_fc2: T unknowns in hidden - T equations. Levenberg-Marquardt starts at tokens
    of images drawn from a natural-image prior. Tokens found are told their positions by the
    distance to what stands there in such images. The image is the one whose tokens these are, by
    least squares through the known blocks below, under the prior, which gives way.

    Reads the two MLP layers of one block and nothing else: no patch embedding, position or
    attention gradient.

    Guarantees:
        All patches are marked `verified` where every token was found to below `accept` and the
        image makes every one of them to 1e-3; else none is.

    Args:
        seconds: Budget of work, in nominal seconds (`Budget`).
        accept: Relative residual below which a token counts as found.

    Raises:
        NotApplicable: A batch, a shuffle, several steps, T >= D, images of more than 4,096 values,
            a block whose rows do not span the tokens, or no token found.
        Blocked: No block has both MLP layers readable.

    References:
        docs/methods.md 4.5.
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
        blocks = Anatomy.of(view.model).blocks
        if view.update.batch_size > 1 or not blocks:
            return 0.0
        names = (f"{layer}.weight" for layer in (blocks[0].proj, blocks[0].fc1, blocks[0].fc2))
        return 0.0 if all(view.update.can_read(name) for name in names) else 0.8

    def least(self, view: View) -> float:
        """Return about how many nominal seconds the search for the tokens takes."""
        anatomy = Anatomy.of(view.model)
        tokens, hidden = anatomy.tokens, 4 * anatomy.width
        return 60 * _STARTS * 12.0 * hidden * tokens**2 / 4e10

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
        stem = Stem(view, anatomy, block.fc1)
        problem = LastBlock.at(view, block, anatomy.tokens, torch.ones(1, dtype=torch.float64))
        natural = stem.natural(_DRAWS, generator)
        found = _search(problem, natural, budget, self.accept, generator)
        if not len(found):
            raise (CutShort if budget.over else NotApplicable)(
                f"no token of block {number} was found"
            )
        if _JACOBIANS * stem.jacobian_seconds > budget.left:
            raise CutShort(f"to invert all below the MLP of block {number} exceeds the budget")
        tokens, known, tell, whiten = _ordered(found @ problem.inner.T, natural)
        white = None
        for _ in range(_ORDERS):
            white = stem.invert(
                tokens, known, whiten, budget, generator, start=white, down_to=_ROUGH
            )
            made = stem.made(white)
            again, known = _assigned(made, found @ problem.inner.T, tell)
            settled = bool(torch.equal(again[known], tokens[known]))
            tokens = again
            if settled or budget.over:
                break
        white = stem.invert(tokens, known, whiten, budget, generator, start=white, weight=_ROUGH)
        image, made = stem.image(white), stem.made(white)
        gap = (made - tokens).norm(dim=1) / tokens.norm(dim=1).clamp_min(1e-300)
        worst = float(gap[known].max())
        proved = bool(known.all()) and worst < 1e-3
        patches = anatomy.patchify(image[None])
        details = {
            "block": number,
            "tokens": anatomy.tokens,
            "found": len(found),
            "residual": worst,
            "seconds": round(1e-9 * (worked() - before), 2),
        }
        if budget.over and not proved:
            details["unfinished"] = ["the blocks below were inverted (budget)"]
        verified = torch.full((1, anatomy.patches), proved, device=patches.device)
        return guess_from_patches(
            view, anatomy, patches, labels=try_labels(view, generator), verified=verified,
            details=details,
        )  # fmt: skip


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
    channels, height, width = view.image_shape
    if channels * height * width > _WIDE:
        raise NotApplicable(f"untried on images of more than {_WIDE} values")
    plain = Released(
        anatomy, {n: t.numel() for n, t in view.update.tensors.items()},
        frozenset(view.update.tensors), view.traits,
    )  # fmt: skip
    wanted = None
    for number, block in enumerate(anatomy.blocks):
        names = (f"{block.fc1}.weight", f"{block.fc2}.weight")
        wanted = wanted or names[0]
        usable = block.pre_norm and not block.gated and block in plain.spanning
        if usable and not plain.hidden(*names):
            return number
    if wanted is None:
        raise NotApplicable("no block is known")
    raise Blocked(wanted, "no block whose rows span the tokens has both MLP layers plain")


def _search(
    problem: LastBlock, natural: Tensor, budget: Budget, accept: float, generator: torch.Generator
) -> Tensor:
    """Return the coordinates of the tokens found, from starts at natural ones."""
    count = problem.inner.shape[1]
    found, idle = problem.inner.new_zeros(0, count), 0
    pool = natural.flatten(0, 1)
    while len(found) < count and idle < _PATIENCE and not budget.over:
        pick = pool[torch.randperm(len(pool), generator=generator)[:_STARTS].to(pool.device)]
        ends, residual = descend(problem, pick @ problem.inner + problem.constant, budget)
        before = len(found)
        for row in residual.argsort().tolist():
            near = (found - ends[row]).norm(dim=1) < _SAME * ends[row].norm()
            if residual[row] < accept and len(found) < count and not bool(near.any()):
                found = torch.cat([found, ends[row : row + 1]])
        idle = 0 if len(found) > before else idle + 1
    return found


def _ordered(found: Tensor, natural: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a token for each position, which positions have one, and two maps that whiten tokens.

    By assignment of the least distance to the mean token of each position, whitened by what varies
    among natural images: roughly, to tell tokens apart, and sharply, to fit them.
    """
    mean = natural.mean(0)
    spread = (natural - mean).flatten(0, 1)
    charge(qr=2 * spread.shape[1] ** 3, products=2.0 * spread.numel() * spread.shape[1])
    values, vectors = torch.linalg.eigh(spread.T @ spread / len(spread))

    def whitening(floor: float) -> Tensor:
        return vectors / values.clamp_min(floor * values[-1]).sqrt()

    tell = whitening(_FLOOR)
    return *_assigned(mean, found, tell), tell, whitening(1e-6)


def _assigned(like: Tensor, found: Tensor, tell: Tensor) -> tuple[Tensor, Tensor]:
    """Return a token for each position, and which have one: those least far from `like` in all."""
    cost = torch.cdist(like @ tell, found @ tell).square()
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    tokens, known = like.clone(), torch.zeros(len(like), dtype=torch.bool, device=like.device)
    tokens[rows], known[rows] = found[columns], True
    return tokens, known
