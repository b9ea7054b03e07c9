"""audit_update(): a client's saved update, audited on its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitguard import data
from vitguard.attacks.base import Attack
from vitguard.audit.agreement import disagreement
from vitguard.audit.corridor import corridor_of
from vitguard.audit.exposure import Exposure, Facts, Run, bound_of
from vitguard.audit.pipeline import CONTROL, findings, level_of
from vitguard.audit.scale import Scale, decoys_for
from vitguard.audit.spreading import Progress, Work
from vitguard.audit.stated import adversary_of, checked_seed, facts_of, given_tensor, names_of
from vitguard.audit.victim import Victim
from vitguard.core import LocalTraining, Loss, Normalization, Update
from vitguard.errors import expected
from vitguard.guard import Guard, Stack, protect, stack_of
from vitguard.models import normalization_of
from vitguard.registry import AnyAttack, families_not_run, parse_attacks, stack_name
from vitguard.report.audit_report import AuditReport
from vitguard.report.finding import Finding
from vitguard.threats.curious_server import Threat
from vitguard.vit import Anatomy
from vitguard.wrapping import require_bare

__all__ = [
    "CONTROL_NOTE",
    "OTHER_CONTROL",
    "audit_update",
    "check_names",
    "sample_photos",
    "without_control",
]

CONTROL_NOTE = (
    "The row none is the control: the same attack on sample photos without a defense, trained as "
    "the update says."
)
OTHER_CONTROL = (
    "This update's training cannot be repeated: its control is one plain gradient, so nothing here "
    "has resisted."
)
_SAME = 1e-2
"""Relative distance up to which weights are those of a craft, 16-bit ones too."""
ON_INPUT = "an attack on the input needs images to change, and a saved update holds none"


def audit_update(
    model: nn.Module,
    update: Update,
    *,
    defenses: Stack = (),
    attacks: str | AnyAttack | Sequence[str | AnyAttack] = "ladder",
    truth: Any = None,
    labels: Any = None,
    normalization: Normalization | None = None,
    withhold: Sequence[str] = (),
    threat: Threat | None = None,
    loss: Loss = F.cross_entropy,
    names: Sequence[str] | None = None,
    model_name: str | None = None,
    weights: str = "as given",
    seed: int = 0,
    workers: int = 1,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Audit a client's update on its own.

    A guess is a leak if it reproduces the update (relative error of the simulated update, and of
    its patch embedding, at most 5 %) or if its patches are proved, whichever `truth` was given.
    Reproducing the update proves nothing where the guess was fitted to it (gradient matching).
    With `truth`, guesses are scored against it as well, and nothing has resisted unless the stated
    weights, images and stack make an update like the one that was received. Without it, every other
    guess is inconclusive, because nothing shows whether it is wrong. The control is the same attack
    on the same model with sample photos and no defense.

    Args:
        model: The public model the update refers to.
        update: What the client sent.
        defenses: The stack the client ran, in `protect`'s form or as a spec.
        attacks: As in `audit`; those on the input are reported as not applicable.
        truth: The images behind the update, pixels in [0, 1]: a tensor, or what `torch.as_tensor`
            makes one of.
        withhold, threat: As in `audit`. Of a malicious server, `model` is what it handed out.
        labels: Their classes, shape (batch,), to score recovered labels; needs `truth`.
        workers, executor, progress: As in `audit`.

    Raises:
        InputError: The update names parameters that the model does not have, or the model is not
            what the threat hands out.
    """
    seed, work = checked_seed(seed), Work(workers, executor)
    require_bare(model)
    anatomy = Anatomy.of(model)
    truth, labels = given_tensor(truth, "truth"), given_tensor(labels, "labels")
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
    if labels is not None and (truth is None or tuple(labels.shape) != shape[:1]):
        raise expected(f"{update.batch_size} labels beside the images", len(labels.reshape(-1)))
    if labels is not None and anatomy.classes:
        labels = data.check_labels(labels, anatomy.classes)
    photos = sample_photos(shape)
    control = Victim(
        model, normalization, training or LocalTraining(), loss, seed, photos,
        data.assign_labels(len(photos), anatomy.classes),
        tuple(f"sample {i}" for i in range(len(photos))), len(photos),
    )  # fmt: skip
    seen = control.facts()
    name = stack_name(stack) if stack else "update"
    facts = _facts(truth, labels, names, update, anatomy, seed)
    guard = protect(copy.deepcopy(model).train(), stack)
    _check_handed_out(guard, adversary)
    expose = partial(_exposed, adversary, guard, update, normalization, loss)
    steps = training and training.steps
    runs = [
        control.run(CONTROL, (), adversary.control(), seen),
        Run(
            name, ((facts, expose),), bound_of(stack, steps),
            corridor=corridor_of(stack, steps, seed),
        ),
    ]  # fmt: skip
    found = findings(runs, chosen, seed=seed, work=work, progress=progress)
    if training is None:
        found = [without_control(f) for f in found]
    if truth is not None and any(f.verdict == "resisted" for f in found):
        stated = replace(control, pixels=truth, names=facts.names, size=len(truth))
        why = disagreement(stated, stack, update, expose().view, labels)
        found = [without_control(f, why) if why else f for f in found]
    found += [
        Finding(name, a.name, "not applicable", ON_INPUT, settings=a.settings())
        for a in asked
        if not isinstance(a, Attack)
    ]
    notes = (
        CONTROL_NOTE if training is not None else f"{CONTROL_NOTE} {OTHER_CONTROL}",
        "" if truth is None else data.faint_note(truth),
    )
    made = str(training) if training is not None else _unknown(update)
    return AuditReport(
        model=facts_of(model, anatomy, model_name),
        images=tuple(names or ()),
        batch_size=update.batch_size,
        baseline=level_of(seen),
        findings=tuple(found),
        weights=weights,
        update=f"{made}, from a file",
        seed=seed,
        threat=adversary.describe(),
        families_not_run=families_not_run(chosen),
        interrupted=work.stop.is_set(),
        notes=tuple(note for note in notes if note),
    )


def _check_handed_out(guard: Guard, threat: Threat) -> None:
    """Refuse a model that is not what a server that writes weights handed out.

    The update was made on these; a craft writes its own weights again as they are.
    """
    own = guard.public_model().state_dict()
    for name, written in (threat.hand_out(guard) or {}).items():
        apart = float((written.double() - own[name].double()).norm())
        if not apart <= _SAME * float(written.double().norm()):
            raise expected(
                "the weights that the malicious server handed out, on which the update was made",
                f"another {name}",
                "Give these as the model (--checkpoint): nothing is crafted for an update that "
                "was made already.",
            )  # fmt: skip


def _unknown(update: Update) -> str:
    steps = "step" if update.local_steps == 1 else "steps"
    rate = "an unknown rate" if update.learning_rate is None else f"rate {update.learning_rate:g}"
    return f"difference after {update.local_steps} {update.optimizer} {steps} at {rate}"


def _facts(
    truth: Tensor | None,
    labels: Tensor | None,
    names: Sequence[str] | None,
    update: Update,
    anatomy: Anatomy,
    seed: int,
) -> Facts:
    """Return what the caller states about the batch behind the update; it is not verified."""
    told = names_of(names, update.batch_size)
    patch = anatomy.patch_size
    if truth is None:
        return Facts(told, patch, certain=False)
    scale = Scale.of(truth, patch, decoys_for(truth, seed), seed)
    return Facts(told, patch, truth, labels, scale, certain=False)


def _exposed(
    threat: Threat, guard: Guard, update: Update, normalization: Normalization, loss: Loss
) -> Exposure:
    return Exposure(threat.view(guard, update, normalization, loss=loss))


def without_control(finding: Finding, reason: str = OTHER_CONTROL) -> Finding:
    """Turn `resisted` into `inconclusive` where no control was made like the update."""
    if finding.verdict != "resisted":
        return finding
    return replace(finding, verdict="inconclusive", reason=reason, undecided=reason)


def sample_photos(shape: tuple[int, int, int, int]) -> Tensor:
    """Return a batch of sample photos, again from the first where they do not suffice."""
    photos = data.sample_images((shape[2], shape[3])).pixels
    photos = data.with_channels(photos, shape[1])
    return photos.repeat(-(-shape[0] // len(photos)), 1, 1, 1)[: shape[0]]


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
    check_names(dict(model.named_parameters()), update)
    if not update.sealed and all(name.startswith("vitguard.") for name in update.tensors):
        raise expected(
            "an update with tensors of the model, plain or sealed", "none of them",
            "Nothing can be said of it: give what the client sent.",
        )  # fmt: skip
    for name, tensor in update.tensors.items():
        if not name.startswith("vitguard.") and not bool(tensor.isfinite().all()):
            raise expected("a finite update", f"NaN or infinity in {name}")
    return update


def check_names(own: Mapping[str, Tensor], update: Update) -> None:
    """Refuse an update of another model: attacks would be blocked by nothing but its names.

    Args:
        own: The model's tensors by name.
    """
    for name, tensor in update.tensors.items():
        if name.startswith("vitguard."):
            continue
        if name not in own:
            raise expected("an update of this model", f"the unknown parameter {name}")
        if tensor.shape != own[name].shape:
            raise expected(f"{name} of shape {tuple(own[name].shape)}", f"{tuple(tensor.shape)}")
