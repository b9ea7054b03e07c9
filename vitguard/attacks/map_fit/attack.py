"""Maximum a posteriori: the image under which the whole damaged update is most probable."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.budget import Budget, charge, update_seconds
from vitguard.attacks.equations.head import linear_head
from vitguard.attacks.evidence import check_seconds, likeliest, mismatch, require_finite
from vitguard.attacks.gelu_span.seams import place_by_seams
from vitguard.attacks.labels import try_labels
from vitguard.attacks.leaked_mask import likely_mask
from vitguard.attacks.map_fit.likelihood import Likelihood
from vitguard.attacks.map_fit.newton import Fit
from vitguard.attacks.map_fit.shuffled_images import ShuffledImages
from vitguard.attacks.robust.attacks import RobustPosition, RobustSpan
from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.core import Guess, Update, View
from vitguard.errors import Blocked, NotApplicable, expected
from vitguard.vit import Anatomy

__all__ = ["MaximumAPosteriori"]

_STARTS = 0.4  # of the budget, for the attacks whose result it starts from


@dataclass(frozen=True)
class MaximumAPosteriori(Attack):
    """Fit pixels to every readable number of the update, under a prior of natural images.

    Minimises sum_t |c S_t(x) - g_t|^2 / sigma_t^2 + prior(x) over the images x by Gauss-Newton
    steps, each solved by conjugate gradients on products with the derivative of the simulated
    update S. Noise, rounding, pruning, clipping and local steps are what S and the levels sigma_t
    say of them (`Likelihood`); c is one unknown scale. A level that is not public is the misfit's
    own, which makes early steps careful: far from the truth everything looks like noise.

    Patches that were shuffled inside a mask make the same update in any order. Where the update
    shows the mask (the faintest rows of learnable positions, the residuals of `span`), they are
    fitted in the slots they went to, under a prior of single patches, and then placed by their
    seams. A wrong mask does not reach the noise.

    Details: `start`, `steps`, `products` (with the derivative and back), `misfit` (of the update,
    over what the known noise explains; None where no level is known), `reached` (whether that is
    1), `finished` (whether the steps settled, and at the noise where that is known), and
    `unfinished` where the budget ended them or they settled in a local minimum above the noise: the
    true images fit better, so the attack has failed, and a failed attack is no protection.

    Args:
        seconds: Budget in nominal seconds of work (`Budget`), the start included.
        steps: Gauss-Newton steps at most.
        inner: Conjugate-gradient iterations of a step at most.
        start: Guess of another attack to start from; None takes the more probable of
            `position-robust` and `span-robust`, or the prior's mean.
        watch: Called after every step with the fit.

    Raises:
        NotApplicable: The update cannot be simulated: dropout, unknown labels, or a shuffle of
            which the update does not show the positions.

    References:
        docs/methods.md 2.5c'.
    """

    name: ClassVar[str] = "map"
    family: ClassVar[str] = "ladder"
    rung: ClassVar[Rung | None] = Rung(
        70, 45, instead_of=("position", "span", "gelu-span", "deep-tokens")
    )
    seconds: float = 60.0
    steps: int = 30
    inner: int = 200
    start: Guess | None = field(default=None, repr=False, compare=False, kw_only=True)
    watch: Callable[[Fit], None] | None = field(
        default=None, repr=False, compare=False, kw_only=True
    )

    def __post_init__(self) -> None:
        check_seconds(self.seconds)
        if self.steps < 1 or self.inner < 1:
            raise expected("steps and inner of at least 1", f"{self.steps} and {self.inner}")

    def share(self, view: View) -> float:
        """Return the share of the ladder's work left; where one gradient is exact, other rungs do.

        Steps of Adam are no gradient, not even the first: nothing but a simulation reads them.
        """
        seen = view.update
        gradient = seen.kind == "gradient" or (seen.optimizer == "sgd" and seen.local_steps == 1)
        return 0.0 if gradient and view.traits.exact else 0.9

    def least(self, view: View) -> float:
        """Return about how many nominal seconds a start and a first step take."""
        return 6 * update_seconds(view)

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {"seconds": self.seconds, "steps": self.steps, "inner": self.inner}

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return the most probable images that were reached."""
        anatomy = Anatomy.of(view.model)
        if view.random():
            raise NotApplicable("the update cannot be simulated: the model draws while it trains")
        require_finite(view)
        budget = Budget.of(self.seconds)
        likelihood = Likelihood.of(_comparable(view, view.update))
        natural = NaturalImages.of(view, anatomy)
        mask, prior = None, natural
        if view.traits.shuffle is not None:
            mask, _ = likely_mask(view, anatomy, generator)
            prior = ShuffledImages.of(natural, mask)
        name, guess = self._begin(view, natural, mask, generator, budget)
        labels = guess.labels
        if labels is None:
            raise NotApplicable("the labels are not known, so the update cannot be simulated")
        labels = labels.to(next(view.model.parameters()).device)
        whole: dict[str, Any] = {"pruned": False} if view.traits.sparse else {}
        if mask is not None:
            whole["shuffled"] = mask

        def simulate(images: Tensor) -> dict[str, Tensor]:
            made = view.simulate(images, labels, None, **whole)
            return dict(_comparable(view, made).update.tensors)

        images = view.normalization.apply(guess.images.to(prior.mean))
        white = prior.whiten(anatomy.patchify(images))
        made = simulate(images.to(next(view.model.parameters())).requires_grad_())
        likelihood = likelihood.only(
            [n for n in likelihood.names if n in made and made[n].requires_grad]
        )
        fit = Fit(view, prior, simulate, likelihood, white, watch=self.watch)
        settled = fit.run(budget, steps=self.steps, inner=self.inner)
        return _guess(view, fit, labels, name, settled, mask, generator)

    def _begin(
        self,
        view: View,
        prior: NaturalImages,
        mask: Tensor | None,
        generator: torch.Generator,
        budget: Budget,
    ) -> tuple[str, Guess]:
        """Return the start and where it is from."""
        batch = view.update.batch_size
        given = self.start
        if given is not None and len(given.images) == batch:
            if given.labels is not None:
                return "given", given
            return "given", replace(given, labels=_labels(view, generator))
        flat = prior.anatomy.unpatchify(prior.mean).expand(batch, -1, -1, -1)
        if batch > 1:  # equal images would stay equal
            noise = torch.randn(flat.shape, generator=generator, dtype=flat.dtype)
            flat = flat + 0.1 * prior.paint(noise.to(flat))
        flat = view.normalization.invert(flat).clamp(0, 1)
        found = [("prior", Guess(images=flat, labels=_labels(view, generator)))]
        share = max(0.5 * _STARTS * budget.left, 1e-3)
        for attack in (RobustPosition(seconds=share), RobustSpan(seconds=share)):
            if batch == 1:
                try:
                    found.append((attack.name, attack.run(view, generator)))
                except (Blocked, NotApplicable):
                    continue
        labels = found[0][1].labels
        named = {
            name: replace(g, labels=labels if g.labels is None else g.labels, shuffled=mask)
            for name, g in found
        }
        if labels is None and all(g.labels is None for g in named.values()):
            raise NotApplicable("the labels are not known, so the update cannot be simulated")
        name = likeliest(view, named) or "prior"
        return name, named[name]


def _labels(view: View, generator: torch.Generator) -> Tensor | None:
    labels = try_labels(view, generator)
    if labels is None and view.update.batch_size == 1:
        labels = try_labels(_comparable(view, view.update), generator)
        labels = labels if labels is not None else _strongest(_comparable(view, view.update))
        labels = labels if labels is not None else _raised(view)
    return labels


def _raised(view: View) -> Tensor | None:
    """Return the label of one image from a difference of any optimizer: its bias alone rises."""
    with suppress(NotApplicable, Blocked):
        return view.read(f"{linear_head(view)}.bias").argmax()[None]
    return None


def _strongest(view: View) -> Tensor | None:
    """Return the label of one image from a damaged gradient: the strongest row of g [f; 1]^T.

    g_c = p_c - 1[c = y] sums to zero and has one negative entry, so that is the largest.
    """
    if view.update.kind != "gradient":
        return None
    try:
        head = linear_head(view)
        rows = view.read(f"{head}.weight")
    except (Blocked, NotApplicable):
        return None
    if view.update.can_read(f"{head}.bias"):
        rows = torch.cat([rows, view.read(f"{head}.bias")[:, None]], 1)
    charge(svd=rows.numel() * min(rows.shape))
    return torch.linalg.svd(rows, full_matrices=False)[0][:, 0].abs().argmax()[None]


def _comparable(view: View, update: Update) -> View:
    """Scale a difference of SGD steps to gradients, seen and simulated alike."""
    with suppress(NotApplicable):
        update = update.as_gradient(view.model, steps=True)
    return replace(view, update=update)


def _guess(
    view: View,
    fit: Fit,
    labels: Tensor,
    name: str,
    settled: bool,
    mask: Tensor | None,
    generator: torch.Generator,
) -> Guess:
    """Return the images with what is known of them; moved patches where their seams fit best."""
    images = view.normalization.invert(fit.images(fit.white)).clamp(0, 1)
    ratio = fit.discrepancy
    details: dict[str, Any] = {
        "start": name,
        "steps": fit.steps,
        "products": fit.products,
        "misfit": None if ratio is None else ratio**0.5,
        "reached": None if ratio is None else fit.reached,
        "finished": settled and (ratio is None or fit.reached),
    }
    if mask is not None:
        anatomy = Anatomy.of(view.model)
        cut = anatomy.patchify(images)
        for i, moved in enumerate(mask.to(images.device)):
            cut[i] = place_by_seams(anatomy, cut[i], ~moved, cut[i][moved], generator)[0]
        images = anatomy.unpatchify(cut)
    guess = Guess(images=images.float(), labels=labels, shuffled=mask, fitted=True)
    details["mismatch"] = mismatch(view, guess)
    if not settled:
        details["unfinished"] = ["all Gauss-Newton steps were taken (budget)"]
    elif not details["finished"]:  # the true images fit the noise, so this is not the best
        details["unfinished"] = ["the noise was reached (a local minimum)"]
    return replace(guess, details=details)
