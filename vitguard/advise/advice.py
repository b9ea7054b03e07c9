"""advise_report(): asks the attacks and the evidence about one model.

Which exact attacks apply is what the attacks themselves say of the counts (docs/methods.md 2.1 to
2.5b and 4.5); which stacks stood is what was measured (`vitguard.evidence`). No model is built with
values: names and sizes are enough.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from vitguard.advise.commands import Audited
from vitguard.advise.counts import Counts
from vitguard.advise.report import AdviceReport
from vitguard.advise.stacks import options, proven, uncovered
from vitguard.errors import InputError, UnsupportedModel, expected
from vitguard.evidence import Evidence, evidence
from vitguard.models import build_model
from vitguard.vit import Anatomy

__all__ = ["See", "Setting", "advise_report"]

Setting = Literal["finetune", "scratch"]
See = Literal["server", "clients", "both"]
_FEW_STEPS = "inverting:iterations=20"
"""What a command attacks a model with that no exact attack reads."""
_MANY = 256
_LARGE = (
    f"an audit of more than {_MANY} images in one update takes hours and much memory; one of a "
    "smaller batch is the stricter test"
)
_CLASSES = 10  # of a head that a bare backbone is given


def advise_report(
    model: str | nn.Module,
    *,
    batch_size: int = 1,
    setting: Setting | None = None,
    train: str = "all",
    see: See = "both",
    checkpoint: str | None = None,
    anatomy: Anatomy | None = None,
    table: Evidence | None = None,
) -> AdviceReport:
    """Say which exact attacks apply, which stacks stood, and how to verify it.

    Args:
        model: A model, or its name as in `build_model`; of a name only sizes are built.
        batch_size: Images behind one update, at least 1.
        setting: `finetune` (weights that somebody trained) or `scratch`; by default `finetune`
            where a checkpoint is given.
        train: What is trained and sent, see `trained_sizes`.
        see: Who must not learn the images: the `server`, the other `clients` (who see the model
            and so the sum of updates), or `both`.
        checkpoint: File of the weights, for the commands; it is not read. Without one those of
            `finetune` take timm's weights where timm has some.
        anatomy: For a model that is not recognised.
        table: Evidence in place of what this package carries.

    Raises:
        InputError: An unknown model, setting or part, or a batch of no image.
        UnsupportedModel: No Vision Transformer.

    Examples:
        >>> advise_report("vit_base_patch32_224", batch_size=1).exact
        ('position', 'span', 'span-chain', 'gelu-span')
    """
    if batch_size < 1:
        raise expected("a batch size of at least 1", batch_size)
    setting = setting or ("finetune" if checkpoint else "scratch")
    for name, value, kinds in (("setting", setting, Setting), ("see", see, See)):
        if value not in get_args(kinds):
            raise expected(f"{name} among {', '.join(get_args(kinds))}", repr(value))
    if checkpoint and setting == "scratch":
        raise expected("setting finetune beside a checkpoint", "'scratch', which is random weights")
    name = model if isinstance(model, str) else type(model).__name__
    network, notes, built = _sized(model) if isinstance(model, str) else (model, [], "")
    audited = (
        Audited.of(network, built, setting, train, checkpoint) if built else Audited("", (), train)
    )
    notes += [audited.note] if audited.note else []
    notes += [_LARGE] if batch_size > _MANY else []
    anatomy = anatomy or Anatomy.of(network)
    asked: dict[str, Any] = {
        "model": name, "batch_size": batch_size, "setting": setting, "train": train, "see": see,
        "notes": tuple(notes),
    }  # fmt: skip
    if anatomy.patches < 1:
        high, wide = anatomy.image_size
        raise expected(
            f"images of at least one patch of {' x '.join(map(str, anatomy.patch_size))} pixels",
            f"{high} x {wide}", "Give a larger img_size, or a smaller patch_size.",
        )  # fmt: skip
    if built and anatomy.classes == 1:
        raise expected(
            "a model of two classes or more, which cross-entropy trains", f"{name} with one",
            "Build it with num_classes=2; audit a loss of your own in Python.",
        )  # fmt: skip
    counts = Counts(network, anatomy, train)
    if why := _odd(network, anatomy):
        fitting = next(proven(counts, audited, batch_size, see), None)
        command = audited.command(batch_size, fitting.stack if fitting else "", _FEW_STEPS)
        said = (
            f"{name} is no plain Vision Transformer ({why}): no exact attack of vitguard reads it, "
            "no stack was measured on it, and matching attacks and labels remain; "
            f"{command} is all that can be said."
        )
        return AdviceReport(**asked, unsupported=said)
    table = evidence() if table is None else table
    measured = table.stacks(setting)
    attacks = tuple(counts.attacks(batch_size))
    offered = tuple(options(counts, audited, batch_size, see, [s for s in measured if s.stood]))
    return AdviceReport(
        **asked,
        tokens=anatomy.tokens,
        width=anatomy.width,
        attacks=attacks,
        options=offered,
        fallen=tuple(s.spec for s in measured if s.fell),
        fell_to=tuple(s.fell_to() for s in measured if s.fell),
        proven=tuple(proven(counts, audited, batch_size, see)),
        uncovered=tuple(uncovered(attacks, batch_size, see)),
        measured=_when(table),
    )


def _sized(spec: str) -> tuple[nn.Module, list[str], str]:
    """Build a model of a name, without values where it can be; a backbone gets a head.

    Returns:
        The model, what a reader must know of it, and the name that an audit builds it from.
    """
    model = _built(spec)
    try:
        bare = Anatomy.of(model).classes == 0
    except UnsupportedModel:
        return model, [], spec
    if not bare:
        return model, [], spec
    name, _, given = spec.partition(":")
    kept = [part for part in given.split(",") if part and not part.startswith("num_classes=")]
    headed = f"{name}:{','.join([*kept, f'num_classes={_CLASSES}'])}"
    try:
        said = f"{spec} has no head: one of {_CLASSES} classes is assumed"
        return _built(headed), [said], headed
    except InputError:
        return model, [f"{spec} has no head, and takes none"], spec


def _built(spec: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build_model(spec)
    except InputError:  # a model that reads values while it is built, as timm's older ones do
        return build_model(spec)


def _odd(model: nn.Module, anatomy: Anatomy) -> str:
    """Say why the equations of a plain Vision Transformer do not describe a model."""
    if not anatomy.blocks:
        return "its blocks were not recognised"
    sizes = {n: p.shape for n, p in model.named_parameters()}
    widths = [sizes.get(f"{block.fc1}.weight", (0, 0))[-1] for block in anatomy.blocks]
    if len(set(widths)) > 1:
        return f"its blocks are {min(widths)} to {max(widths)} wide"
    return ""


def _when(table: Evidence) -> str:
    if not table.date:
        return "This package carries no evidence."
    made = ", ".join(f"{k} {v}" for k, v in table.versions.items())
    return f"Measured on {table.date} ({made}); to measure again: {table.command}"
