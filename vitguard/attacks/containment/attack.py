"""Containment: the image whose layer inputs contain every row that an update sends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.budget import Budget, CutShort, worked
from vitguard.attacks.containment.fit import Fit, proved
from vitguard.attacks.containment.spaces import RowSpaces, adapters, later
from vitguard.attacks.equations.rows import guess_from_patches
from vitguard.attacks.evidence import check_seconds, require_finite
from vitguard.attacks.labels import try_labels
from vitguard.attacks.robust.attacks import RobustSpan
from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.core import Guess, View
from vitguard.errors import Blocked, NotApplicable
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy

__all__ = ["Containment"]

_EQUATIONS = 16  # kept for each pixel at most
_STARTS = 8
_CLOSE = 0.2  # missed, root mean square over rows, below which patches may only be out of order
_ORDERS = 12  # tried from there
_LOOK = 2  # steps of each, before the best go on
_LIGHT = 1e-3  # weight of the prior on the way from there
_WIDE = 4096  # values of an image: above, the Jacobian does not fit


@dataclass(frozen=True)
class Containment(Attack):
    """Fit an image so that the inputs of every layer span the rows that were sent.

    A gradient dL/dW = sum_t d_t a_t^T cut to its r strongest singular values keeps rows V_r that
    lie in the row space of the layer's inputs L(x). So V_r - V_r L(x)^+ L(x) = 0 in every linear
    layer, the patch embedding and the head among them: r (width - tokens) equations a layer for the
    pixels. An adapter of LoRA, y = (W + B A) x, sends rows of A that lie in the same span, from its
    second step on (before, B is zero and so is dL/dA); those of B lie in that of A L(x)^T. Whole
    matrices of later blocks do the same, and are read where the first block sends none.
    Levenberg-Marquardt in pixels, under a natural-image prior that gives way to the equations, from
    the guess of another attack, the prior's mean, and images drawn from it.

    Reads neither positions nor how strong the rows are.

    Guarantees:
        A patch is marked `verified` only where the equations that were fitted outnumber the pixels,
        every row lies in the inputs up to the rounding of the update, rows that were held out of
        the fit among them, the patches in another order do not, and the covariance of the solution
        bounds the error of the patch.
        Where the equations outnumber the pixels and it does not end in such a proof, `details` say
        so in `unfinished`: the true image solves them, so the search has failed, and a failed
        search is no protection.

    Args:
        seconds: Budget of work, in nominal seconds (`Budget`).
        start: Guess of another attack to start from; None takes that of `span-robust`.

    Raises:
        NotApplicable: Whole matrices of the first block, which other attacks read; of later ones
            alone, a case in which nobody has tried it; tokens that fill every layer.
        CutShort: Of low rank, a case in which nobody has tried it: a batch, a shuffle, several
            local steps or another optimizer than plain SGD, images of more than 4,096 values.
        Blocked: No weight of a linear layer can be read.

    References:
        docs/methods.md 4.5.
    """

    name: ClassVar[str] = "containment"
    family: ClassVar[str] = "ladder"
    rung: ClassVar[Rung | None] = Rung(48, 42)
    seconds: float = 60.0
    start: Guess | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_seconds(self.seconds)

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {"seconds": self.seconds}

    def share(self, view: View) -> float:
        """Return the share of the ladder's work left; none where other attacks read the rows."""
        if _low_rank(view):
            return 0.8
        return 0.8 if _later(view) and not _untried(view) else 0.0

    def remains(self, plain: Released) -> tuple[Remaining, ...]:
        """Say that rows stay inside the inputs; how far that goes is measured."""
        a = plain.anatomy
        beside = tuple(adapters(sorted(plain.plain), a))
        whole = tuple(later(plain.plain, a))
        layers = (f"{layer}.weight" for b in a.blocks for layer in (b.fc1, b.fc2, b.proj))
        if plain.traits.rank or beside:
            names = beside or tuple(name for name in layers if name in plain.plain)
        elif whole:
            names = whole
        else:
            return ()
        if not names or plain.tokens >= a.width:
            why = "no layer is plain whose width exceeds its tokens"
            return (Remaining(self.name, False, names, why),)
        if names is not whole:
            return (Remaining(self.name, True, names, "a search, no closed form: run it to know"),)
        count, pixels = _equations(plain), plain.batch_size * a.patches * a.patch_pixels
        why = f"a search for {pixels:,} pixels by {count:,} equations of later blocks"
        return (Remaining(self.name, count >= pixels, names, why),)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return one image."""
        if not _low_rank(view):
            if not _later(view):
                raise NotApplicable("matrices are sent whole: other attacks read them")
            view = view.gradient()
            if untried := _untried(view):
                raise NotApplicable(f"untried on {untried}")
        budget, before = Budget.of(self.seconds), worked()
        require_finite(view)
        view = _tried(view)
        anatomy = Anatomy.of(view.model)
        anatomy.require_plain_embedding()
        pixels = torch.Size(view.image_shape).numel()
        spaces = RowSpaces(view, anatomy, view.traits.rank, _EQUATIONS * pixels, generator)
        if spaces.jacobian_seconds > budget.left:
            raise CutShort("one derivative of the layers takes more than the budget")
        fit = Fit(spaces, NaturalImages.of(view, anatomy), budget)
        white, missed, settled = self._search(fit, generator)
        verified = proved(fit, white)
        details: dict[str, Any] = {
            "rank": max(len(rows) for rows in spaces.rows.values()),
            "equations": spaces.total,
            "unknowns": pixels,
            "residual": missed,
            "seconds": round(1e-9 * (worked() - before), 2),
        }
        if not settled:
            details["unfinished"] = ["every start was tried (budget)"]
        elif spaces.total > pixels and not bool(verified.all()):
            details["unfinished"] = ["an image was found that the equations prove"]
        return guess_from_patches(
            view, anatomy, anatomy.patchify(fit.image(white)[None]),
            labels=try_labels(view, generator), verified=verified[None], details=details,
        )  # fmt: skip

    def _search(self, fit: Fit, generator: torch.Generator) -> tuple[Tensor, float, bool]:
        """Return the best end of all descents, what it misses, and whether none was cut."""
        ends: list[tuple[float, Tensor]] = []
        for white in self._starts(fit, generator):
            for end, whole in self._ends(fit, white):
                ends.append((fit.missed(end), end))
                if (found := fit.contained(end)) or not whole:
                    missed, best = min(ends, key=lambda end: end[0])
                    return best, missed, found
        missed, best = min(ends, key=lambda end: end[0])
        return best, missed, True

    def _ends(self, fit: Fit, white: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Yield the end of a descent, and of those with patches moved that go on falling."""
        end, whole = fit.descend(white)
        yield end, whole
        missed = fit.missed(end)
        if not whole or missed > _CLOSE:
            return
        for moved in fit.reordered(end, _ORDERS):
            trial, whole = fit.descend(moved, weight=_LIGHT, steps=_LOOK)
            if whole and fit.missed(trial) < missed:
                trial, whole = fit.descend(trial, weight=_LIGHT)
            yield trial, whole
            if not whole:
                return

    def _starts(self, fit: Fit, generator: torch.Generator) -> Iterator[Tensor]:
        view, flat = fit.spaces.view, torch.zeros(fit.pixels).to(fit.prior.mean)
        guess = self.start
        if guess is None and view.traits.rank:
            guess = _robust(view, 0.1 * fit.budget.left, generator)
        if guess is not None and len(guess.images) == 1:
            images = view.normalization.apply(guess.images.to(flat))
            yield fit.prior.whiten(fit.spaces.anatomy.patchify(images))[0]
        yield flat
        for _ in range(_STARTS):
            yield torch.randn(flat.shape, generator=generator, dtype=flat.dtype).to(flat)


def _low_rank(view: View) -> bool:
    return bool(view.traits.rank or adapters(view.update.tensors, Anatomy.of(view.model)))


def _robust(view: View, seconds: float, generator: torch.Generator) -> Guess | None:
    try:
        return RobustSpan(seconds=max(seconds, 1e-3)).run(view, generator)
    except (Blocked, NotApplicable):
        return None


def _later(view: View) -> bool:
    names = [name for name in view.update.tensors if view.update.can_read(name)]
    return bool(later(names, Anatomy.of(view.model)))


def _equations(plain: Released) -> int:
    """Return how many equations the rows of whole matrices give, at most."""
    a, total = plain.anatomy, 0
    for block in a.blocks:
        spans = block in plain.spanning
        attention = plain.tokens if spans else min(plain.tokens, 2 * block.heads + 1)
        free = a.width - plain.tokens
        total += free * attention if not plain.plain.isdisjoint(block.qkv) else 0
        for layer in (block.proj, block.fc1, block.fc2):
            name, rows = f"{layer}.weight", plain.tokens if spans else plain.batch_size
            if name in plain.plain:
                wide = plain.sizes[name] // a.width if layer == block.fc2 else a.width
                total += rows * max(wide - plain.tokens, 0)
    for reader in a.readers:  # a token of its own reads all others there
        if not plain.plain.isdisjoint(reader.qkv):
            total += (a.width - plain.tokens) * min(plain.tokens, 2 * reader.heads + 1)
    return total


def _untried(view: View) -> str:
    """Name the first way in which a view differs from the cases that were tried, "" for none."""
    reasons = {
        "a batch: rows of all images are mixed": view.update.batch_size > 1,
        "a shuffle: the inputs cannot be computed": view.traits.shuffle is not None,
        f"images of more than {_WIDE} values": torch.Size(view.image_shape).numel() > _WIDE,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _tried(view: View) -> View:
    """Return the view as one gradient, or say in what it differs from the cases that were tried."""
    try:
        single = view.gradient()
    except NotApplicable as why:
        raise CutShort(f"untried on such an update: {why}") from None
    if untried := _untried(view):
        raise CutShort(f"untried on {untried}")
    return single
