"""Containment: the image whose layer inputs contain every row that a low-rank update sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.budget import Budget, CutShort, charge, worked
from vitguard.attacks.containment.spaces import RowSpaces
from vitguard.attacks.equations.rows import guess_from_patches
from vitguard.attacks.evidence import require_finite
from vitguard.attacks.labels import try_labels
from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.core import Guess, View
from vitguard.errors import NotApplicable, expected
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy

__all__ = ["Containment"]

_EQUATIONS = 3  # kept for each pixel
_STARTS = 16
_STEPS = 80
_STALLED = 0.3  # share of the cost that a step has to take away, else the prior gives way
_DOWN_TO = 1e-12  # weight of the prior below which to stop
_WIDE = 4096  # values of an image: above, the Jacobian does not fit
_UNSURE = 1e-2  # error of a pixel value (model-input units) up to which a patch counts as proved


@dataclass(frozen=True)
class Containment(Attack):
    """Fit an image so that the inputs of every layer span the rows that were sent.

    A gradient dL/dW = sum_t d_t a_t^T cut to its r strongest singular values keeps rows V_r that
    lie in the row space of the layer's inputs L(x). So V_r - V_r L(x)^+ L(x) = 0 in every linear
    layer, the patch embedding and the head among them: r (width - tokens) equations a layer for the
    pixels. Levenberg-Marquardt in pixels under a natural-image prior that gives way to them. It
    reads neither positions nor how strong the rows are.

    Guarantees: a patch is marked `verified` where the equations outnumber the pixels, all of them
    hold to `accept`, and their derivative bounds the error of the patch. The true image solves the
    equations, so an end anywhere else is a failure, named in `unfinished`, and no resistance.

    Args:
        seconds: Budget of work, in nominal seconds (`Budget`).
        accept: Root mean square of what the rows miss, relative to them, below which they are
            contained.

    Raises:
        NotApplicable: An update that is not of low rank, a batch, a shuffle, several steps, images
            of more than 4,096 values, or tokens that fill every layer.
        Blocked: No weight of a linear layer can be read.

    References:
        docs/methods.md 4.5.
    """

    name: ClassVar[str] = "containment"
    family: ClassVar[str] = "ladder"
    rung: ClassVar[Rung | None] = Rung(48, 42)
    seconds: float = 60.0
    accept: float = 1e-4

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise expected("seconds above 0", self.seconds)
        if not 0 < self.accept < 1e-2:
            raise expected("accept between 0 and 0.01", self.accept)

    def share(self, view: View) -> float:
        """Return the share of the ladder's work left; none where the update is of full rank."""
        return 0.8 if view.traits.rank else 0.0

    def remains(self, plain: Released) -> tuple[Remaining, ...]:
        """Say that rows of low rank stay inside the inputs; how far that goes is measured."""
        if not plain.traits.rank:
            return ()
        a = plain.anatomy
        names = tuple(f"{b.fc1}.weight" for b in a.blocks if f"{b.fc1}.weight" in plain.plain)
        if not names or a.tokens >= a.width:
            why = "no layer is plain whose width exceeds its tokens"
            return (Remaining(self.name, False, names, why),)
        return (Remaining(self.name, True, names, "a search, no closed form: run it to know"),)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return one image."""
        if not view.traits.rank:
            raise NotApplicable("the update is not of low rank: other attacks read it")
        if view.update.batch_size > 1:
            raise NotApplicable("untried on a batch: rows of all images are mixed")
        if view.traits.shuffle is not None:
            raise NotApplicable("the inputs cannot be computed: patches were shuffled in secret")
        pixels = view.image_shape[0] * view.image_shape[1] * view.image_shape[2]
        if pixels > _WIDE:
            raise NotApplicable(f"untried on images of more than {_WIDE} values")
        budget, before = Budget.of(self.seconds), worked()
        view = view.gradient()
        require_finite(view)
        anatomy = Anatomy.of(view.model)
        anatomy.require_plain_embedding()
        spaces = RowSpaces(view, anatomy, view.traits.rank, _EQUATIONS * pixels, generator)
        if spaces.jacobian_seconds > budget.left:
            raise CutShort("one derivative of the layers takes more than the budget")
        prior = NaturalImages.of(view, anatomy)
        image, jacobian, rest = _search(spaces, prior, budget, self.accept, generator)
        equations = min(spaces.total, _EQUATIONS * pixels)
        level = float(rest.square().mean().sqrt()) * _scale(spaces)
        known = spaces.total > pixels and level < self.accept
        verified = torch.zeros(1, anatomy.patches, dtype=torch.bool, device=image.device)
        if known:
            verified = _proved(prior, anatomy, jacobian, rest)[None]
        details = {
            "rank": view.traits.rank,
            "equations": equations,
            "unknowns": pixels,
            "residual": level,
            "seconds": round(1e-9 * (worked() - before), 2),
        }
        if not bool(verified.all()):
            why = "fewer equations than pixels"
            if spaces.total > pixels:
                why = "a local minimum, or rows too few to tell images apart"
            details["unfinished"] = ["budget" if budget.over else why]
        return guess_from_patches(
            view, anatomy, anatomy.patchify(image[None]), labels=try_labels(view, generator),
            verified=verified, details=details,
        )  # fmt: skip


def _scale(spaces: RowSpaces) -> float:
    """Return what makes a root mean square relative to rows of unit length."""
    entries = sum(rows.numel() for rows in spaces.rows.values())
    return (entries / sum(len(rows) for rows in spaces.rows.values())) ** 0.5


def _search(
    spaces: RowSpaces,
    prior: NaturalImages,
    budget: Budget,
    accept: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best end of descents from the prior's mean and from images drawn from it."""
    start = torch.zeros(spaces.view.image_shape).to(prior.mean)
    best = None
    for _ in range(_STARTS):
        found = _fit(spaces, prior, budget, start)
        if best is None or found[2].square().sum() < best[2].square().sum():
            best = found
        if budget.over or float(best[2].square().mean().sqrt()) * _scale(spaces) < accept:
            break
        start = torch.randn(start.shape, generator=generator, dtype=start.dtype).to(start)
    assert best is not None
    return best


def _fit(
    spaces: RowSpaces, prior: NaturalImages, budget: Budget, white: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image, the derivative by the prior's coordinates, and what the rows miss there."""
    shape = spaces.view.image_shape
    pixels = white.numel()
    eye = torch.eye(pixels).to(white)
    directions = prior.paint(eye.view(pixels, *shape))

    def image(white: Tensor) -> Tensor:
        return spaces.anatomy.unpatchify(prior.colour(white))

    gap = spaces.missed(image(white))
    weight, damping, jacobian, hessian = 1.0, 1.0, None, None
    for _ in range(_STEPS):
        if jacobian is None or hessian is None:
            jacobian = spaces.jacobian(image(white), directions)
            hessian = jacobian @ jacobian.T
            charge(products=2.0 * jacobian.numel() * pixels)
        if budget.over:
            break
        cost = float(gap.square().sum() + weight * white.square().sum())
        slope = jacobian @ gap + weight * white.flatten()
        charge(qr=pixels**3 / 3)
        step = torch.linalg.solve(hessian + (weight + damping) * eye, slope)
        trial = white - step.view_as(white)
        new = spaces.missed(image(trial))
        gain = 1 - float(new.square().sum() + weight * trial.square().sum()) / max(cost, 1e-300)
        if gain > 0:
            white, gap, damping = trial, new, max(0.2 * damping, 1e-14)
        else:
            damping *= 8
        if gain < 0.9 and weight > _DOWN_TO:
            hessian = None if gain > 0 else hessian
        if 0 < gain < _STALLED:
            if weight < _DOWN_TO:
                break
            weight *= 0.1
        elif damping > 1e9:
            break
    assert jacobian is not None
    return image(white), jacobian, gap


def _proved(prior: NaturalImages, anatomy: Anatomy, jacobian: Tensor, rest: Tensor) -> Tensor:
    """Return the patches whose error, by the derivative of the equations, is small.

    Equations with independent errors of the size left: the covariance of the solution.
    """
    charge(qr=2.0 * len(jacobian) ** 3)
    values, vectors = torch.linalg.eigh(jacobian @ jacobian.T)
    if not float(values[0]) > 1e-13 * float(values[-1]):
        return torch.zeros(anatomy.patches, dtype=torch.bool, device=rest.device)
    shape = (len(jacobian), *prior_shape(anatomy, prior))
    spread = prior.paint((vectors / values.sqrt()).T.reshape(shape))
    error = anatomy.patchify(spread).square().sum(0).mean(-1) * rest.square().mean()
    return error.sqrt() < _UNSURE


def prior_shape(anatomy: Anatomy, prior: NaturalImages) -> tuple[int, ...]:
    """Return the shape of an image of the prior."""
    return tuple(anatomy.unpatchify(prior.mean).shape)
