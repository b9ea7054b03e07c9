"""`vitguard audit`: from options to a report. It imports nothing heavy before it must."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from vitguard.cli.audit_forms import check_places, deliver, line_of
from vitguard.cli.audit_options import check_options
from vitguard.cli.output import Progress
from vitguard.errors import expected

__all__ = ["run"]

DEFAULT_DEFENSES = (
    "positions:kind=frozen",
    "positions:kind=sincos",
    "withheld",
    "noise:scale=0.01",
    "privacy:epsilon=8.0,epochs=3",
    "encryption:select=plan",
    "encryption:select=all",
)
DEFAULT_BUDGET = 50.0
"""Nominal seconds of climbing that a run without --attack shares among its updates."""
_CROPS = 7919
"""Seed of the crops that fill a batch: decoys are drawn with another."""


def run(options: argparse.Namespace) -> int:
    """Audit as the options say and return the exit code.

    Raises:
        VitguardError: An option, the model, the images or a defense is refused.
    """
    check_options(options)
    check_places(options)
    return deliver(_advised(_run_audit(options), options), options)


def _advised(report: Any, options: argparse.Namespace) -> Any:
    """Add the one sentence of `vitguard advise`, for the model and batch that were audited.

    Where it fails, the audit is done all the same: a note says so.
    """
    from vitguard.advise import advise_report

    trained = options.pretrained or options.checkpoint or options.before
    try:
        said = advise_report(
            options.model,
            batch_size=report.batch_size,
            setting="finetune" if trained else "scratch",
            train=_train(options),
            checkpoint=options.checkpoint or options.before,
        )
        return dataclasses.replace(report, advice=said.sentence())
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        note = f"no advice on what to use could be given ({line_of(error)})"
        return dataclasses.replace(report, notes=(*report.notes, note))


def _run_audit(options: argparse.Namespace) -> Any:
    from vitguard import data
    from vitguard.audit.beside_control import LocalTraining, audit
    from vitguard.audit.received import audit_update
    from vitguard.models import (
        build_model,
        check_finite,
        find_device,
        load_checkpoint,
        normalization_of,
    )
    from vitguard.registry import parse_stack
    from vitguard.threats import parse_threat
    from vitguard.vit import Anatomy

    stacks = {spec.strip(): parse_stack(spec) for spec in options.defense or ()}
    attacks = _attacks(options)
    model = build_model(options.model, pretrained=options.pretrained, seed=options.seed)
    weights = "pretrained" if options.pretrained else "random initialisation"
    if options.checkpoint:
        notes = load_checkpoint(model, options.checkpoint)
        weights = "; ".join((f"checkpoint {options.checkpoint}", *notes))
    check_finite(model)
    anatomy = Anatomy.of(model)
    trained = _trained(model, options)
    if not anatomy.classes:
        raise expected("a model with a classification head", options.model, "Add num_classes=...")
    normalization = normalization_of(model)
    if options.mean:
        normalization = dataclasses.replace(
            normalization,
            mean=_numbers(options.mean, "--mean", anatomy.channels),
            std=_numbers(options.std, "--std", anatomy.channels),
        )
    for selector in options.withhold:
        anatomy.select(selector, [n for n, _ in model.named_parameters()])
    model = model.to(find_device(options.device))
    common: dict[str, Any] = {
        "attacks": attacks, "normalization": normalization,
        "threat": parse_threat(options.threat, options.withhold),
        "model_name": options.model, "weights": weights, "seed": options.seed,
        "workers": options.workers,
    }  # fmt: skip
    if options.update_file:
        update = _stored(options, model)
        if options.before:
            common["weights"] = f"checkpoint {options.before}"
        if len(stacks) > 1:
            raise expected("one --defense, what the client ran", f"{len(stacks)}")
        truth = names = None
        said: tuple[str, ...] = ()
        if options.images:
            if (given := data.count_images(options.images)) != update.batch_size:
                raise expected(
                    f"--images with the {update.batch_size} images behind the update, in order",
                    f"{given}",
                )
            images = data.load_images(
                options.images, anatomy.image_size, min_size=anatomy.patch_size
            )
            truth, names = data.with_channels(images.pixels, anatomy.channels), images.names
            said = images.notes
        stack = next(iter(stacks.values()), [])
        with Progress() as progress:
            report = audit_update(
                model, update, defenses=stack, truth=truth, names=names, progress=progress, **common
            )
        notes = tuple(dict.fromkeys((*report.notes, *said, *trained)))
        return dataclasses.replace(report, notes=notes)
    images, labels, notes = _images(options, anatomy)
    notes += trained
    if not options.defense:
        stacks, left_out = _default_stacks(model)
        notes += left_out
    if not options.attack:
        control_and_stacks = 1 + sum(map(bool, stacks.values())) + bool(options.withhold)
        common["attacks"], note = _budgeted(control_and_stacks * len(images) // options.batch_size)
        notes.append(note)
    training = LocalTraining(options.lr, options.local_steps or 1, options.optimizer or "sgd")
    with Progress() as progress:
        return audit(
            model, (images.pixels, labels), defenses=stacks, batch_size=options.batch_size,
            training=training, names=images.names, notes=notes, progress=progress, **common,
        )  # fmt: skip


def _train(options: argparse.Namespace) -> str:
    return "/".join(options.train or ("all",))


def _trained(model: Any, options: argparse.Namespace) -> list[str]:
    """Let the model train what the options name, and return what a reader must know of it."""
    from vitguard.trained import adds_layers, train_only

    if not options.train:
        return []
    train = _train(options)
    if options.update_file and adds_layers(train):
        raise expected(
            "--train with parts of the model beside --update-file",
            f"{train}, which adds layers whose weights are in no option",
            "Audit the model with its adapters in Python: vitguard.audit.audit_update.",
        )
    own = sum(p.numel() for p in model.parameters())
    train_only(model, train, seed=options.seed)
    moved = sum(p.numel() for p in model.parameters() if p.requires_grad)
    note = f"trained and sent: {train}, {moved:,} values, {moved / own:.2%} of the model's own"
    if adds_layers(train):
        note += "; what is added was drawn as after some steps"
    return [note]


def _default_stacks(model: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the default defenses that the model takes, and a note on those that it does not."""
    import copy

    from vitguard.errors import InputError
    from vitguard.guard import protect
    from vitguard.registry import parse_stack

    stacks: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for spec in DEFAULT_DEFENSES:
        stack = parse_stack(spec)
        try:
            protect(copy.deepcopy(model), stack)
        except InputError as error:
            left_out[spec] = str(error).partition(". ")[0].removesuffix(".")
        else:
            stacks[spec] = stack
    if not left_out:
        return stacks, []
    why = next(iter(left_out.values()))
    return stacks, [f"default defenses that do not fit this model: {', '.join(left_out)} ({why})"]


def _stored(options: argparse.Namespace, model: Any) -> Any:
    """Return the update in the file, by what the options say of it."""
    from vitguard import data
    from vitguard.audit.stored import stored_update
    from vitguard.tensor_files import is_saved_update

    count = options.batch_size
    file = Path(options.update_file)
    if count is None and options.images and file.is_file() and not is_saved_update(file):
        count = data.count_images(options.images)
    return stored_update(
        file, model, before=options.before, kind=options.update, batch_size=count,
        local_steps=options.local_steps, learning_rate=options.lr, optimizer=options.optimizer,
    )  # fmt: skip


def _attacks(options: argparse.Namespace) -> list[Any]:
    from vitguard.registry import parse_attacks

    attacks: list[Any] = []
    fast = options.device.partition(":")[0] == "cpu" and options.iterations is None
    chosen: list[Any] = parse_attacks(options.attack or ["ladder"], fast=fast)
    for attack in chosen:
        fields = {f.name for f in dataclasses.fields(attack)}
        changes = {
            name: getattr(options, name)
            for name in ("iterations", "parameters")
            if getattr(options, name) is not None and name in fields
        }
        attacks.append(dataclasses.replace(attack, **changes))
    for name in ("iterations", "parameters"):
        if getattr(options, name) is not None and not any(hasattr(a, name) for a in attacks):
            raise expected(
                f"--attack with one that has {name} beside --{name}",
                ", ".join(dict.fromkeys(a.name for a in attacks)), "Add --attack matching.",
            )  # fmt: skip
    return attacks


def _budgeted(updates: int) -> tuple[list[Any], str]:
    """Return the ladder with a share of the default budget, and what a reader must know of it."""
    from vitguard.attacks.ladder.attack import Ladder

    seconds = round(min(max(DEFAULT_BUDGET / updates, 5.0), Ladder().seconds))
    note = (
        f"the ladder had {seconds} nominal seconds of work for each update; more may find more: "
        f"--attack ladder:seconds={int(4 * seconds)}"
    )
    return [Ladder(seconds=seconds)], note


def _images(options: argparse.Namespace, anatomy: Any) -> tuple[Any, Any, list[str]]:
    from vitguard import data

    size, batch = anatomy.image_size, options.batch_size
    if options.images:
        count = options.num_images
        found = data.count_images(options.images)
        if count is None and len(options.images) == 1:
            count = min(max(4, batch), found)
        images = data.load_images(
            options.images, size, count=count, classes=anatomy.classes,
            min_size=anatomy.patch_size,
        )  # fmt: skip
    else:
        count = options.num_images or max(2, batch)
        beyond = 0 if options.num_images else max(count - len(data.SAMPLE_NAMES), 0)
        images = data.sample_images(size, count=count - beyond, classes=anatomy.classes)
        if beyond:
            images = _with_crops(images, beyond, anatomy.classes)
        found = len(images)
    notes = list(images.notes)
    if (channels := anatomy.channels) != 3:
        kind = "grey" if channels == 1 else f"{channels} channels: R, G, B, R, ... in turn"
        notes.append(f"the model takes {channels} channels; the images were made {kind}")
        pixels = data.with_channels(images.pixels, channels)
        images = dataclasses.replace(images, pixels=pixels)
    if options.num_images is None and found > len(images):
        notes.append(f"the first {len(images)} of {found} images; --num-images {found} takes all")
    if len(images) < batch:
        raise expected(f"at least {batch} images for one batch", len(images))
    if extra := len(images) % batch:
        kept = len(images) - extra
        notes.append(f"{extra} images that fill no batch of {batch} were left out")
        images = dataclasses.replace(
            images, names=images.names[:kept], pixels=images.pixels[:kept],
            labels=None if images.labels is None else images.labels[:kept],
        )  # fmt: skip
    return images, images.labels, notes


def _with_crops(images: Any, count: int, classes: int) -> Any:
    """Return sample photos and `count` crops of pictures: a batch of any size without a folder."""
    import torch

    from vitguard import data

    size = (images.pixels.shape[-2], images.pixels.shape[-1])
    crops = data.decoys(count, size, seed=_CROPS)
    total = len(images) + count
    note = f"{count} of {total} images are crops of pictures: {len(images)} sample photos are there"
    return dataclasses.replace(
        images, names=(*images.names, *(f"crop {i + 1}" for i in range(count))),
        pixels=torch.cat([images.pixels, crops]), labels=data.assign_labels(total, classes),
        notes=(*images.notes, note),
    )  # fmt: skip


def _numbers(text: str, flag: str, channels: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != channels:
        names = "three numbers R,G,B" if channels == 3 else f"{channels} numbers, one a channel"
        raise expected(f"{flag} as {names}", repr(text))
    return values
