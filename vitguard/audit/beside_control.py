"""audit(): every attack beside an undefended control, and what it says."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard import data
from vitguard.attacks.base import Attack, InputAttack
from vitguard.audit.of_rounds import Rounds, audit_rounds
from vitguard.audit.pipeline import CONTROL, findings, level_of
from vitguard.audit.spreading import Progress, Work
from vitguard.audit.stated import adversary_of, checked_seed, facts_of, names_of
from vitguard.audit.victim import Victim
from vitguard.core import LocalTraining, Loss, Normalization
from vitguard.defenses.base import Defense
from vitguard.errors import expected
from vitguard.guard import Guard, Stack, protect, stack_of
from vitguard.models import check_finite, normalization_of
from vitguard.registry import AnyAttack, families_not_run, parse_attacks, stack_name
from vitguard.report.audit_report import AuditReport
from vitguard.threats.curious_server import Threat
from vitguard.vit import Anatomy
from vitguard.wrapping import require_bare

__all__ = ["LocalTraining", "audit"]

Stacks = Stack | Mapping[str, Stack]


def audit(
    model: nn.Module | Rounds,
    batch: Sequence[Any] | None = None,
    *,
    defenses: Stacks = (),
    attacks: str | AnyAttack | Sequence[str | AnyAttack] = "ladder",
    batch_size: int | None = None,
    normalization: Normalization | None = None,
    withhold: Sequence[str] = (),
    threat: Threat | None = None,
    training: LocalTraining | None = None,
    loss: Loss = F.cross_entropy,
    names: Sequence[str] | None = None,
    model_name: str | None = None,
    weights: str = "as given",
    notes: Sequence[str] = (),
    seed: int = 0,
    workers: int = 1,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Attack what a client would share, with and without defenses, and judge.

    The undefended control always runs. The model is copied; yours is not changed.

    Args:
        model: The bare model, before `protect`. Or, alone, what was seen of federated rounds (see
            `vitguard.federated.local`): each client's message, each sum, and the difference of two
            sums where there is one are attacked, each beside a control of its own.
        batch: Pixels in [0, 1], shape (images, channels, height, width), and class indices:
            tensors, or what `torch.as_tensor` makes tensors of.
        defenses: One stack, exactly what `protect` takes (a list, one defense, or a spec such as
            `"positions:kind=frozen"`); or several stacks by name.
        attacks: Names, groups (`closed-form`, `matching`, `input`, `all`) or attacks. The default
            climbs every exact attack within a minute's work (nominal seconds) per batch. On a CPU a
            name means the attack's preset for a CPU, unless it sets iterations; `details` name the
            schedule. One with `resume` keeps a file for each configuration and batch, named after
            it.
        batch_size: Images behind one update; all of them by default. The images are cut into
            batches of this size.
        normalization: From pixels to model input; what the model's own configuration says by
            default.
        withhold: Selectors of parameters that are never sent (see `Anatomy.select`).
        threat: The adversary, in place of a curious server to which these are withheld.
        training: How the update is made; one gradient by default.
        names, model_name, weights, notes: For the report.
        seed: Seeds the defenses' draws and the attacks; the same seed gives the same report,
            wherever it is made, up to rounding where the number of torch's threads differs.
        workers: Threads over configurations and batches. With one a keyboard interrupt ends the
            running attack at its best so far, and the report tells what was not run.
        executor: In place of `workers`: any `concurrent.futures.Executor`, such as a process pool
            or that of a Dask client. Each attack on each batch of each configuration is a job, and
            gets the model, the images and their decoys. A job that is lost, by a process that dies
            or by something that does not pickle, makes its finding inconclusive and says so. On an
            interrupt what runs comes to its end. The executor is not shut down.
        progress: Called with (done, total, what) as configurations finish.

    Raises:
        InputError: Pixels outside [0, 1], labels out of range, weights that are not finite, ...
        Incompatible: A stack that cannot work.
    """
    seed, notes = checked_seed(seed), [notes] if isinstance(notes, str) else notes
    if isinstance(model, Guard):
        raise expected(
            "a model, before protect", "a Guard",
            "Audit its stack beside a control: vg.audit(model, batch, defenses=stack).",
        )  # fmt: skip
    if not isinstance(model, nn.Module | str):
        given = (batch, defenses or None, batch_size, normalization, training, names)
        if any(value is not None for value in given) or loss is not F.cross_entropy:
            raise expected(
                "nothing but rounds to audit", "a batch, defenses, names or training beside them",
                "A round holds its own.",
            )  # fmt: skip
        return audit_rounds(
            model, attacks=attacks, adversary=adversary_of(threat, withhold),
            model_name=model_name, weights=weights, notes=notes, seed=seed,
            work=Work(workers, executor), progress=progress,
        )  # fmt: skip
    work = Work(workers, executor)
    pixels, labels = _check_batch(model, batch, batch_size)
    size = batch_size or len(pixels)
    normalization = normalization or normalization_of(model)
    training = training or LocalTraining()
    adversary = adversary_of(threat, withhold)
    chosen = parse_attacks(attacks, fast=next(model.parameters()).device.type == "cpu")
    names = names_of(names, len(pixels))
    stacks: dict[str, Sequence[Defense]] = {"none": ()}
    stacks |= {k: s for k, s in _stacks(defenses).items() if s}
    for stack in stacks.values():
        protect(copy.deepcopy(model), stack)  # a stack that cannot work fails before the first run
    victim = Victim(model, normalization, training, loss, seed, pixels, labels, names, size)
    facts, openly = victim.facts(), adversary.control()
    runs = [victim.run(CONTROL, (), openly, facts)]
    runs += [
        victim.run(name, stack, adversary, facts)
        for name, stack in stacks.items()
        if stack or adversary != openly
    ]
    on_updates = [a for a in chosen if isinstance(a, Attack)]
    found = findings(runs, on_updates, seed=seed, work=work, progress=progress)
    on_inputs = [a for a in chosen if isinstance(a, InputAttack)]
    found += work.done([victim.on_input(n, s, a) for a in on_inputs for n, s in stacks.items()])
    notes = [
        *notes,
        data.faint_note(pixels),
        data.copies_note(pixels),
        *(d.audit_note() for stack in stacks.values() for d in stack),
    ]
    if work.stop.is_set():
        notes.append("a keyboard interrupt ended this audit early: what is missing says so")
    return AuditReport(
        model=facts_of(model, Anatomy.of(model), model_name),
        images=names,
        batch_size=size,
        baseline=level_of(facts),
        findings=tuple(found),
        weights=weights,
        update=str(training),
        seed=seed,
        threat=adversary.describe(),
        families_not_run=families_not_run(chosen),
        notes=tuple(note for note in dict.fromkeys(notes) if note),
        interrupted=work.stop.is_set(),
    )


def _stacks(defenses: Stacks) -> dict[str, list[Defense]]:
    if not isinstance(defenses, Mapping):
        stack = stack_of(defenses)
        return {stack_name(stack): stack}
    stacks = {str(name): stack_of(stack) for name, stack in defenses.items()}
    if len(stacks) < len(defenses):
        raise expected("stacks with names of their own", f"{len(stacks)} names of {len(defenses)}")
    if stacks.get("none") or CONTROL in stacks:
        raise expected("stacks with names of their own", "'none' or '', the undefended control")
    return stacks


def _check_batch(
    model: nn.Module, batch: Sequence[Any] | None, batch_size: int | None
) -> tuple[Tensor, Tensor]:
    require_bare(model)
    anatomy = Anatomy.of(model)
    pixels, labels = _tensors(batch)
    shape = (anatomy.channels, *anatomy.image_size)
    if pixels.dim() != 4 or tuple(pixels.shape[1:]) != shape or not len(pixels):
        raise expected(
            f"images of shape (images, {', '.join(map(str, shape))})", tuple(pixels.shape)
        )
    if not bool(pixels.isfinite().all()):
        raise expected("finite images", "NaN or infinity")
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        # the usual normalisations stay below 3, and go below 0
        raw = low >= 0 and 3 < high <= 255
        do = "Divide by 255." if raw else "Give pixels and normalization=Normalization(mean, std)."
        raise expected("pixels in [0, 1]", f"values from {low:.3g} to {high:.3g}", do)
    if not anatomy.classes:
        raise expected(
            "a model with a classification head", "one without (num_classes=0)",
            "Give it one, such as model.reset_classifier(10).",
        )  # fmt: skip
    labels = data.check_labels(labels, anatomy.classes)
    if len(labels) != len(pixels):
        raise expected(f"{len(pixels)} labels", len(labels))
    if batch_size is not None and (batch_size < 1 or len(pixels) % batch_size):
        raise expected(
            f"a batch size that divides the {len(pixels)} images", batch_size,
            "Change --batch-size or --num-images.",
        )  # fmt: skip
    check_finite(model)
    return pixels, labels


def _tensors(batch: Any) -> tuple[Tensor, Tensor]:
    # a loader or a lone tensor of images would be taken apart along its first dimension
    parts = batch if isinstance(batch, tuple | list) and len(batch) == 2 else ()
    try:
        pixels, labels = (torch.as_tensor(part) for part in parts)
    except (TypeError, ValueError, RuntimeError) as error:
        got = " and ".join(type(p).__name__ for p in parts) or type(batch).__name__
        raise expected(
            "batch=(images, labels), two tensors or arrays of numbers", got,
            "Of a loader, give one batch: next(iter(loader)).",
        ) from error  # fmt: skip
    return pixels.float(), labels
