"""Polish: drive a nearly right image to the precision that the update's rounding allows."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import ENDLESS, Budget
from vitguard.attacks.equations.grid import LEVELS, ON_GRID, ROUNDED, nearest_levels
from vitguard.attacks.equations.linear import WholeUpdate, least_squares
from vitguard.attacks.evidence import mismatch
from vitguard.attacks.ladder.block_equations import BlockEquations, Preconditioner
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable, expected
from vitguard.vit import Anatomy

__all__ = ["polish"]

_NEAR = 1e-2  # mismatch above which a guess is too far for linearised equations
_MISSED = 2.0  # misfit over its expected noise above which the equations have more to say
_CERTAIN = 0.02  # levels; no pixel of such a patch is half a level off
_FLOOR = 8  # units of rounding: the true image's update differs by 3 to 5 (float32)

Patches = Float[Tensor, "patches pixels"]


def polish(
    view: View,
    guess: Guess,
    generator: torch.Generator,
    budget: Budget = ENDLESS,
    *,
    levels: int | None = LEVELS,
) -> Guess:
    """Return a nearly right image made exact, or as it was where that explains nothing more.

    Where every pixel lies near a multiple of 1 / levels, as image files store them, all are set to
    those. Otherwise:

    1. Gauss-Newton on the first block's equations for the image as a whole: attention is computed,
       not solved for, and each equation is weighted by what rounding leaves of it.
    2. Patches whose pixels lie near such multiples are set to them; the few others follow by least
       squares from the whole update.

    The adversary's own test decides: step 1 counts where the update that the image would make
    comes nearer to the one seen, rounding where it comes as near as that of the update's type
    (`mismatch` below 8 units of it). An image off the grid fails that: it stays as step 1 left it.

    Details: `polish` says what was done, `rounded to the grid of image files` among it, and the
    mismatch before and after; or the reason why nothing was. Where the budget ended it,
    `unfinished` says so.

    Args:
        budget: Once it is spent no iteration is begun.
        levels: Grey levels above zero of an image file; None keeps real values.

    Raises:
        InputError: `levels` below 1.

    References:
        docs/methods.md 2.4 and 2.4b.
    """
    if levels is not None and levels < 1:
        raise expected("levels of at least 1", levels)
    view = view.gradient()
    known = guess.details.get("mismatch")
    before = known if isinstance(known, float) else mismatch(view, guess)
    if before is None or len(guess.images) != 1:
        return _saying(guess, "not tried: needs one image and an update that can be simulated")
    if before > _NEAR:
        return _saying(guess, "not tried: the guess is not near")
    if before < _floor(view):
        return _saying(guess, "not needed: the update is explained to its rounding")
    if budget.over:
        return _cut(_saying(guess, "not tried: the budget was spent"))
    if levels is not None and (exact := _on_grid(view, guess, levels)) is not None:
        whole, last = exact
        return _saying(whole, f"{ROUNDED}: mismatch {before:.1e} -> {last:.1e}")
    done: list[str] = []
    half = budget.part(0.5)
    refined, last = _refined(view, guess, before, half)
    if last < before:
        done.append("refined")
    if levels is not None:
        exact = _rounded(view, refined, generator, budget, levels)
        if exact is not None:
            refined, last = exact
            done.append(ROUNDED)
    said = " and ".join(done) or "nothing gained"
    made = _saying(refined, f"{said}: mismatch {before:.1e} -> {last:.1e}")
    return _cut(made) if half.over and not last < _floor(view) else made


def _floor(view: View) -> float:
    return _FLOOR * torch.finfo(next(iter(view.update.tensors.values())).dtype).eps


def _saying(guess: Guess, what: str) -> Guess:
    return replace(guess, details={**guess.details, "polish": what})


def _cut(guess: Guess) -> Guess:
    left = [*guess.details.get("unfinished", ()), "polish"]
    return replace(guess, details={**guess.details, "unfinished": left})


def _patches(view: View, guess: Guess) -> Patches:
    images = guess.images[:1].detach().double()
    return Anatomy.of(view.model).patchify(view.normalization.apply(images))[0]


def _with(view: View, guess: Guess, patches: Patches) -> Guess:
    images = Anatomy.of(view.model).unpatchify(patches[None])
    return replace(guess, images=view.normalization.invert(images).clamp(0, 1))


def _refined(view: View, guess: Guess, before: float, budget: Budget) -> tuple[Guess, float]:
    """Take Gauss-Newton steps on the first block's equations while they explain more."""
    try:
        equations = BlockEquations.of(view, Anatomy.of(view.model))
    except (NotApplicable, Blocked):
        return guess, before
    for _ in range(2):
        c = _patches(view, guess) @ equations.basis
        weights = equations.weights(c)
        rest = -equations.misfits(c, weights)
        if budget.over or not float(rest.square().mean()) > _MISSED**2:
            break
        moved = c + _step(equations, c, weights, rest, budget)
        trial = _with(view, guess, moved @ equations.basis.T)
        after = mismatch(view, trial)
        if after is None or not after < before:
            break
        guess, before = trial, after
    return guess, before


def _step(
    equations: BlockEquations,
    c: Tensor,
    weights: tuple[Tensor, Tensor],
    rest: Tensor,
    budget: Budget,
) -> Tensor:
    """Return the least-squares solution of the linearised equations."""
    root = Preconditioner.of(equations, c, weights)

    def misfits(c: Tensor) -> Tensor:
        return equations.misfits(c, weights)

    def forth(u: Tensor) -> Tensor:
        equations.charge(3.0)
        return torch.func.jvp(misfits, (c,), (root.up(u),))[1]

    def down(r: Tensor) -> Tensor:
        equations.charge(2.0)
        return root.down(back(r)[0])

    back = torch.func.vjp(misfits, c)[1]
    return root.up(
        least_squares(
            forth,
            down,
            rest,
            iterations=24,
            budget=budget,
        )
    )


def _on_grid(view: View, guess: Guess, levels: int) -> tuple[Guess, float] | None:
    """Set all pixels to the grid if each patch is near it and that explains the update."""
    anatomy = Anatomy.of(view.model)
    pixels = anatomy.patchify(guess.images.detach().double())[0]
    near, away = nearest_levels(pixels, levels)
    if bool((away > ON_GRID).any()):
        return None
    whole = replace(guess, images=anatomy.unpatchify(near[None]))
    distance = mismatch(view, whole)
    return (whole, distance) if distance is not None and distance < _floor(view) else None


def _rounded(
    view: View, guess: Guess, generator: torch.Generator, budget: Budget, levels: int
) -> tuple[Guess, float] | None:
    """Set patches to the grid, solve for the rest, until the update is explained to rounding."""
    anatomy, floor = Anatomy.of(view.model), _floor(view)
    pixels = anatomy.patchify(guess.images.detach().double())[0]
    limit, labels = ON_GRID, guess.labels
    for _ in range(4):
        near, away = nearest_levels(pixels, levels)
        whole = replace(guess, images=anatomy.unpatchify(near[None]))
        distance = mismatch(view, whole)
        if distance is not None and distance < floor:
            return whole, distance
        free = away > limit
        if not bool(free.any()):  # some pixel is wrong: doubt the three least certain patches
            limit = max(float(away.topk(min(3, len(away))).values[-1]), _CERTAIN)
            free = away >= limit
        share = float(free.double().mean())
        if not 0 < share <= 0.5 or labels is None or budget.over:
            return None
        fixed = anatomy.unpatchify(torch.where(free[:, None], pixels, near)[None])
        patches = _patches(view, replace(guess, images=fixed))
        try:
            update = WholeUpdate.at(view, patches, labels.to(patches.device), free)
        except NotApplicable:
            return None
        patches[free] += update.step(budget.part(0.8), generator)
        pixels[free] = anatomy.patchify(_with(view, guess, patches).images)[0][free]
    return None
