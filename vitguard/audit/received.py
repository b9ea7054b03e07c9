"""audit_update(): a client's saved update, audited on its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard import data
from vitguard.attacks.base import Attack, InputAttack
from vitguard.audit.attempts import attempt, covered, decoys_for, run_attack
from vitguard.audit.beside_control import LocalTraining, adversary_of, audit, facts_of
from vitguard.audit.stage import INTERRUPTED
from vitguard.audit.verdicts import LABELS_ONLY, Attempt, finding_of
from vitguard.core import Guess, Loss, Normalization, Update, View
from vitguard.errors import VitguardError, expected
from vitguard.guard import Stack, protect, stack_of
from vitguard.metrics import baseline
from vitguard.models import normalization_of
from vitguard.registry import families_not_run, parse_attacks, stack_name
from vitguard.report.audit_report import AuditReport
from vitguard.report.finding import Control, Finding, Pictures
from vitguard.threats.curious_server import Threat
from vitguard.vit import Anatomy

__all__ = ["audit_update"]

CONTROL_NOTE = (
    "The row none is the control: the same attack on sample photos without a defense, trained as "
    "the update says."
)
OTHER_CONTROL = (
    "This update's training cannot be repeated: its control is one plain gradient, so nothing here "
    "has resisted."
)
ON_INPUT = "an attack on the input needs images to change, and a saved update holds none"
_ALIKE = 40.0
"""PSNR in dB from which a guess is the image that was given; a flat one is no leak by its gain."""
_REPRODUCED = 0.05
"""Relative error of the simulated update up to which a guess explains the update."""


def audit_update(
    model: nn.Module,
    update: Update,
    *,
    defenses: Stack = (),
    attacks: str | Sequence[str | Attack | InputAttack] = "ladder",
    truth: Tensor | None = None,
    labels: Tensor | None = None,
    normalization: Normalization | None = None,
    withhold: Sequence[str] = (),
    threat: Threat | None = None,
    loss: Loss = F.cross_entropy,
    names: Sequence[str] | None = None,
    model_name: str | None = None,
    weights: str = "as given",
    seed: int = 0,
) -> AuditReport:
    """Audit a client's update on its own.

    A guess leaks if it reproduces the update (relative error of the simulated update and of its
    patch embedding at most 5 %) or proves patches, whatever the truth is said to be; one that was
    fitted to the update (gradient matching) cannot show it that way. With `truth` guesses are
    scored against it as well. Without, any other is inconclusive: nobody can say that it is wrong.
    The control is the same attack on the same model with sample photos and no defense.

    Args:
        model: The public model the update refers to.
        update: What the client sent.
        defenses: The stack the client ran, in `protect`'s form or as a spec.
        attacks: As in `audit`; those on the input are reported as not applicable.
        truth: The images behind the update, pixels in [0, 1].
        withhold, threat: As in `audit`.
        labels: Their classes, shape (batch,), to score recovered labels; needs `truth`.

    Raises:
        InputError: The update names parameters that the model does not have.
    """
    anatomy = Anatomy.of(model)
    normalization = normalization or normalization_of(model)
    update = _taken_in(model, update)
    stack, adversary = stack_of(defenses), adversary_of(threat, withhold)
    fast = next(model.parameters()).device.type == "cpu"
    asked = parse_attacks(attacks, fast=fast)
    chosen = [a for a in asked if isinstance(a, Attack)]
    training = LocalTraining.of(update)
    shape = (update.batch_size, anatomy.channels, *anatomy.image_size)
    if truth is not None and tuple(truth.shape) != shape:
        raise expected(f"the images behind the update, of shape {shape}", tuple(truth.shape))
    if labels is not None and (truth is None or len(labels) != update.batch_size):
        raise expected(f"{update.batch_size} labels beside the images", len(labels))
    pixels = _photos(shape)
    control = audit(
        model, (pixels, data.assign_labels(len(pixels), anatomy.classes)), attacks=chosen,
        normalization=normalization, training=training or LocalTraining(), loss=loss, seed=seed,
    )  # fmt: skip
    made = str(training) if training is not None else _unknown(update)
    guard = protect(copy.deepcopy(model).train(), stack)
    view = adversary.view(guard, update, normalization, loss=loss)
    name = f"{stack_name(stack)}" if stack else "update"
    findings = [replace(f, defense="none") for f in control.findings]

    def judge(attack: Attack, of_control: Finding) -> Finding:
        if truth is not None:
            scored = _scored(attack, view, truth, labels, names, anatomy, seed)
            common = (name, attack.name, attack.settings(), [scored])
            finding = finding_of(*common, replace(of_control, control=None), ())
            return _unless_explained(finding, attack, view, scored.guess, seed)
        return _explain(name, attack, view, of_control, seed)

    interrupted = control.interrupted
    for attack, of_control in zip(chosen, control.findings, strict=True):
        found = Finding(
            name, attack.name, "inconclusive", INTERRUPTED, settings=attack.settings(),
            control=Control(of_control.verdict, of_control.psnr),
        )  # fmt: skip
        try:
            found = found if interrupted else judge(attack, of_control)
        except KeyboardInterrupt:
            interrupted = True
        interrupted = interrupted or "interrupted" in found.details
        if training is None and found.verdict == "resisted":
            found = replace(found, verdict="inconclusive", reason=OTHER_CONTROL)
        findings.append(found)
    findings += [
        Finding(name, a.name, "not applicable", ON_INPUT, settings=a.settings())
        for a in asked
        if not isinstance(a, Attack)
    ]
    return AuditReport(
        model=facts_of(model, anatomy, model_name),
        images=tuple(names or ()),
        batch_size=update.batch_size,
        baseline=control.baseline,
        findings=tuple(findings),
        weights=weights,
        update=f"{made}, from a file",
        seed=seed,
        threat=adversary.describe(),
        families_not_run=families_not_run(chosen),
        interrupted=interrupted,
        notes=(CONTROL_NOTE if training is not None else f"{CONTROL_NOTE} {OTHER_CONTROL}",),
    )


def _unknown(update: Update) -> str:
    steps = "step" if update.local_steps == 1 else "steps"
    rate = "an unknown rate" if update.learning_rate is None else f"rate {update.learning_rate:g}"
    return f"difference after {update.local_steps} {update.optimizer} {steps} at {rate}"


def _scored(
    attack: Attack,
    view: View,
    truth: Tensor,
    labels: Tensor | None,
    names: Sequence[str] | None,
    anatomy: Anatomy,
    seed: int,
) -> Attempt:
    decoys = decoys_for(truth, seed)
    patch = anatomy.patch_size
    mean = covered(data.mean_image(decoys), patch)
    level = baseline(covered(truth, patch), patch, mean_image=mean)
    empty = Attempt(truth, tuple(names or (f"truth {i}" for i in range(len(truth)))), level)
    return attempt(
        attack,
        view,
        empty,
        labels=torch.zeros(0) if labels is None else labels,
        patch_size=anatomy.patch_size,
        decoys=decoys,
        seed=seed,
    )


def _photos(shape: tuple[int, int, int, int]) -> Tensor:
    """Return a batch of sample photos, again from the first where they do not suffice."""
    photos = data.sample_images((shape[2], shape[3])).pixels
    photos = data.with_channels(photos, shape[1])
    return photos.repeat(-(-shape[0] // len(photos)), 1, 1, 1)[: shape[0]]


def _explain(name: str, attack: Attack, view: View, control: Finding, seed: int) -> Finding:
    """Judge a guess by whether it reproduces the update, for want of the truth."""
    base = Finding(
        name, attack.name, "inconclusive", settings=attack.settings(),
        control=Control(control.verdict, control.psnr),
    )  # fmt: skip
    state, reason, guess, seconds = run_attack(attack, view, seed)
    if guess is None:
        return replace(base, verdict="inconclusive" if state == "failed" else state, reason=reason)
    if not len(guess.images):
        details = {**guess.details}
        return replace(base, reason=LABELS_ONLY, seconds=seconds, details=details)
    error = _relative_error(view, guess, seed)
    details = {**guess.details, "update_error": error}
    if guess.verified is not None:
        details["verified"] = float(guess.verified.double().mean())
    shown = data.pictured(guess.images.detach().float().cpu())
    found = replace(base, seconds=seconds, details=details, images=Pictures(reconstruction=shown))
    if reason := _explanation(attack, guess, error):
        return replace(found, verdict="leaks", reason=reason)
    why = "the guess does not reproduce the update"
    if error is None:
        why = "whether the guess reproduces the update could not be checked"
    elif error is not None and error <= _REPRODUCED:
        why = f"the guess was fitted to the update (to {100 * error:.2g} %): others may fit as well"
    return replace(found, reason=f"the truth is not known and {why}")


def _explanation(attack: Attack, guess: Guess, error: float | None) -> str:
    """Return why the update itself says that a guess is right, "" where it does not.

    Gradient matching makes this very error small, with images that are nothing like the truth.
    """
    if error is not None and error <= _REPRODUCED and attack.family != "matching":
        return f"the reconstruction reproduces the update to {100 * error:.2g} %"
    if guess.verified is not None and bool(guess.verified.any()):
        proved, patches = int(guess.verified.sum()), guess.verified.numel()
        return f"{proved} of {patches} patches proved by the attack itself"
    return ""


def _unless_explained(
    finding: Finding, attack: Attack, view: View, guess: Guess | None, seed: int
) -> Finding:
    """Turn a finding into a leak where the guess explains the update and is not the truth given.

    Then the images, the normalisation or the settings that were given are not the update's.
    """
    if finding.verdict == "leaks" or guess is None or not len(guess.images):
        return finding
    if not (reason := _explanation(attack, guess, _relative_error(view, guess, seed))):
        return finding
    if finding.psnr is None or finding.psnr.max < _ALIKE:
        reason += ", and is none of the images that were given: check them, mean and deviation"
    return replace(finding, verdict="leaks", reason=reason)


def _relative_error(view: View, guess: Guess, seed: int) -> float | None:
    """Relative error of what the guess would send: of all tensors, or of the earliest one.

    The larger one; None where it cannot be simulated, or where no early tensor was sent: the last
    layers say little of pixels.
    """
    labels, batch = guess.labels, view.update.batch_size
    if labels is None or not len(labels) == len(guess.images) == batch or not view.update.tensors:
        return None
    like = next(view.model.parameters())
    images = view.normalization.apply(guess.images).to(like)
    generator = torch.Generator().manual_seed(seed)
    try:
        made = view.simulate(images, labels.to(like.device), generator).tensors
    except VitguardError:
        return None
    if not (early := [name for name in _early(Anatomy.of(view.model)) if name in made]):
        return None

    def error(names: Iterable[str]) -> float:
        known = {k: view.update.tensors[k].double() for k in names}
        gap = sum(float((made[k].detach() - t).square().sum()) for k, t in known.items())
        total = sum(float(t.square().sum()) for t in known.values())
        return (gap / total) ** 0.5 if total else math.inf  # zeros prove nothing

    ratio = max(error(made), error(early[:1]))
    return ratio if math.isfinite(ratio) else None


def _early(anatomy: Anatomy) -> list[str]:
    """Return the tensors whose gradient is a sum over patches or tokens of the first block."""
    if not anatomy.blocks:
        return [anatomy.patch_weight]
    block = anatomy.blocks[0]
    layers = [f"{layer}.weight" for layer in (block.proj, block.fc1)]
    return [anatomy.patch_weight, *block.qkv, *layers]


def _taken_in(model: nn.Module, update: Update) -> Update:
    """Return the update on the model's device, without the buffers of a whole state dict."""
    if not isinstance(update, Update):
        raise expected(
            "an Update", type(update).__name__,
            "Wrap the tensors: vg.Update(tensors, kind='difference', batch_size=8).",
        )  # fmt: skip
    buffers = model.state_dict().keys() - dict(model.named_parameters()).keys()
    device = next(model.parameters()).device
    tensors = {k: t.to(device) for k, t in update.tensors.items() if k not in buffers}
    update = replace(update, tensors=tensors)
    _check_update(model, update)
    return update


def _check_update(model: nn.Module, update: Update) -> None:
    shapes = {k: p.shape for k, p in model.named_parameters()}
    for name, tensor in update.tensors.items():
        if name.startswith("vitguard."):
            continue
        if name not in shapes:
            raise expected("an update of this model", f"the unknown parameter {name}")
        if tensor.shape != shapes[name]:
            raise expected(f"{name} of shape {tuple(shapes[name])}", f"{tuple(tensor.shape)}")
        if not bool(tensor.isfinite().all()):
            raise expected("a finite update", f"NaN or infinity in {name}")
