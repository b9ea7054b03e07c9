"""The closed forms against one's own update, where the images are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.analysis import released
from vitguard.attacks.base import Attack, guess_of
from vitguard.attacks.budget import Budget, CutShort
from vitguard.attacks.labels import try_labels
from vitguard.core import Batch, Guess, Traits, Update, View
from vitguard.defenses.base import Defense, traits_of
from vitguard.defenses.gate import Tried
from vitguard.errors import Blocked, InputError, NotApplicable
from vitguard.metrics import baseline, score
from vitguard.models import normalization_of
from vitguard.registry import attack_types
from vitguard.vit import Anatomy, canonical_name, logits_of

__all__ = ["attack_own"]

_OUTSIDE = 1e-3
"""Of the range of pixels: rounding."""
_COSINE = 0.995
"""Of each matrix of an update and of what a guess makes: 10 % of its length apart."""


def attack_own(
    model: nn.Module,
    update: Update,
    batch: Batch,
    *,
    defenses: Sequence[Defense],
    traits: Traits,
    extras: dict[str, Tensor],
    work: float,
) -> list[Tried]:
    """Run every registered closed form on an update, and score it by the images behind it.

    Args:
        model: The public model, a copy.
        batch: Model input, and labels.
        work: Nominal seconds for all of them together.
    """
    anatomy = Anatomy.of(model)
    normalization = normalization_of(model)
    truth = normalization.invert(batch.images.detach()).cpu()
    device = next(model.parameters()).device
    readable = {k: t.to(device) for k, t in update.tensors.items()}
    view = View(
        model=model.eval(),
        update=replace(update, tensors=readable),
        image_shape=(anatomy.channels, *anatomy.image_size),
        normalization=normalization,
        classes=anatomy.classes,
        settings={d.name: d.settings() for d in defenses},
        extras=extras,
        simulate=_not_simulated,
        traits=traits,
    )
    plain = released(model, anatomy, traits)
    kinds = [k for k in attack_types().values() if issubclass(k, Attack)]
    budget = Budget.of(work)
    tried = []
    for attack in (k() for k in kinds if k.family == "closed-form"):
        one = _tried(attack, view, truth, anatomy.patch_size, budget)
        if one.state == "not applicable":
            control = _tried(attack, _control(view, batch), truth, anatomy.patch_size, budget)
            one = replace(one, opens=control.state in ("ran", "cut"))
        left = (r.needs for r in attack.remains(plain) if r.possible)
        tried.append(replace(one, needs=tuple(dict.fromkeys(n for each in left for n in each))))
    return tried


def _control(view: View, batch: Batch) -> View:
    """Return what an adversary would see of a plain gradient of the batch, without a defense."""
    update = Update(_plain_gradient(view.model, batch), batch_size=len(batch.images))
    own = traits_of([], Anatomy.of(view.model))
    return replace(view, update=update, traits=own, settings={}, extras={})


def _plain_gradient(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the gradient of each parameter by name; the model is a copy, of which all train."""
    parameters = {canonical_name(n): p for n, p in model.named_parameters()}
    with torch.enable_grad():
        for p in parameters.values():
            p.requires_grad_(True)
        loss = F.cross_entropy(logits_of(model(batch.images)), batch.labels)
        made = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, made, strict=True))


def _tried(
    attack: Attack, view: View, truth: Tensor, patch: tuple[int, int], budget: Budget
) -> Tried:
    if budget.over:
        return Tried(attack.name, "cut", "the gate's work was spent")
    if any(f.name == "seconds" for f in fields(attack)):  # type: ignore[arg-type]
        attack = replace(attack, seconds=budget.left)  # type: ignore[call-arg]
    try:
        guess = guess_of(attack, view, torch.Generator().manual_seed(0))
        scored = _scored(attack.name, guess, truth, patch)
        return replace(scored, reproduces=_reproduces(view, guess))
    except Blocked as error:
        return Tried(attack.name, "blocked", str(error))
    except CutShort as error:
        return Tried(attack.name, "cut", str(error))
    except NotApplicable as error:
        return Tried(attack.name, "not applicable", str(error))
    except Exception as error:  # noqa: BLE001 - an attack that broke found nothing, and says nothing
        return Tried(attack.name, "failed", f"{type(error).__name__}: {error}")


def _scored(name: str, guess: Guess, truth: Tensor, patch: tuple[int, int]) -> Tried:
    if unfinished := guess.details.get("unfinished"):
        cut: Tried = Tried(name, "cut", f"unfinished: {unfinished}")
    else:
        cut = Tried(name, "ran")
    if not len(guess.images):
        return replace(cut, state="not applicable", reason="it gives labels alone")
    verified = None if guess.verified is None else guess.verified.detach().cpu()
    # a proof needs no truth: it counts beside images that cannot be compared
    proved = 0.0 if verified is None else float(verified.double().mean())
    failed = Tried(name, "failed", proved=proved)
    if not bool(guess.images.isfinite().all()):
        return replace(failed, reason="an image with values that are not finite")
    high, wide = (n - n % p for n, p in zip(truth.shape[-2:], patch, strict=True))
    truth, images = (t[..., :high, :wide].detach().cpu() for t in (truth, guess.images))
    if images.shape[1:] != truth.shape[1:]:
        given, made = tuple(truth.shape[1:]), tuple(images.shape[1:])
        return replace(failed, reason=f"Expected images of shape {made}, as it makes, got {given}")
    least, most = (float(end) for end in truth.aminmax())
    if not (least >= -_OUTSIDE and most <= 1 + _OUTSIDE):
        reason = (
            "Expected images as the model takes them, got some whose pixels are from "
            f"{least:.3g} to {most:.3g} without the model's normalisation, where 0 to 1 is right. "
            "Normalise them with vitguard.models.normalization_of(model).apply(pixels)."
        )
        return replace(failed, reason=reason)
    try:
        scores = score(images, truth, patch, verified=verified)
        level = baseline(truth, patch)
    except InputError as error:
        return replace(failed, reason=f"{type(error).__name__}: {error}")
    gains = (scores.psnr - level.psnr, scores.patch_psnr - level.patch_psnr)
    return replace(
        cut,
        gain=max(float(g.max()) for g in gains),
        psnr=float(torch.maximum(scores.psnr, scores.patch_psnr).max()),
        proved=proved,
    )


def _reproduces(view: View, guess: Guess) -> bool:
    """Whether guessed images make what can be read of an update, up to a factor.

    Then they are the images behind it, whatever others were given: of these nothing is asked.
    """
    shape = (view.update.batch_size, *view.image_shape)
    images = guess.images.detach()
    if guess.fitted or images.shape != shape or not bool(images.isfinite().all()):
        return False
    generator = torch.Generator().manual_seed(0)
    labels = guess.labels if guess.labels is not None else try_labels(view, generator)
    if labels is None or labels.shape != (len(images),):
        return False
    like = next(view.model.parameters())
    pixels = view.normalization.apply(images.to(like))
    try:
        made = _plain_gradient(view.model, Batch(pixels, labels.to(like.device)))
    except (RuntimeError, ValueError, IndexError):  # labels that are no classes of the model
        return False
    pairs = [(t, made[n]) for n, t in view.update.tensors.items() if n in made and t.dim() > 1]
    return bool(pairs) and all(_alike(one, other) for one, other in pairs)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors point the same way, or against each other, to a few per cent."""
    one, other = one.detach().double().flatten(), other.double().flatten()
    length = one.norm() * other.norm()
    if not float(length):
        return not (bool(one.any()) or bool(other.any()))
    return bool((one @ other).abs() >= _COSINE * length)


def _not_simulated(*_: object, **__: object) -> Update:
    raise NotApplicable("a gate simulates no update: it runs closed forms only")
