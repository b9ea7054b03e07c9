"""A report as TensorBoard events, alone or as one of several over a training run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitguard.errors import expected, missing_extra
from vitguard.report.finding import Finding, plain
from vitguard.report.markdown import escaped, to_markdown
from vitguard.report.results import AuditResults
from vitguard.report.words import clean

__all__ = ["open_writer", "to_tensorboard", "write_report", "writer_type"]

ROOT = "audit"
"""What the tags of a report begin with, so that they stand apart from those of a training run."""


def to_tensorboard(report: AuditResults, directory: str | Path, *, step: int = 0) -> None:
    """Write the report as TensorBoard events into a folder."""
    with open_writer(directory) as writer:
        write_report(writer, report, step)


def write_report(writer: Any, report: AuditResults, step: int) -> None:
    """Write scalars, pictures and the text of a report, under the same tags at every step.

    `audit/DEFENSE/ATTACK/psnr_max`, and so on: one curve for each defense and attack. An attack
    that ran several times with other settings is numbered: `ATTACK-2`.
    """
    writer.add_text(f"{ROOT}/report", to_markdown(report), step)
    used: Counter[str] = Counter()
    for finding in report.findings:
        tag = f"{ROOT}/{clean(finding.configuration)}/{clean(finding.attack)}"
        used[tag] += 1
        if used[tag] > 1:
            tag = f"{tag}-{used[tag]}"
        for name, value in _scalars(report, finding).items():
            if plain(value) is not None:
                writer.add_scalar(f"{tag}/{name}", value, step)
        verdict = f"**{finding.verdict}** {escaped(finding.reason)}".rstrip()
        writer.add_text(f"{tag}/verdict", verdict, step)
        for name, images in _images(finding):
            writer.add_images(f"{tag}/{name}", images, step)


def open_writer(folder: str | Path) -> Any:
    """Return a writer of events into a folder, which is made if need be.

    The new file is readable by its owner alone.

    Raises:
        MissingExtra: TensorBoard is not installed.
        InputError: The folder cannot be written or made.
    """
    make, earlier = writer_type(), _event_files(folder)
    try:
        writer = make(str(folder))
        for file in _event_files(folder) - earlier:  # it will show images
            file.chmod(0o600)
    except OSError as error:
        raise expected("a folder for TensorBoard", f"{folder} ({error.strerror})") from error
    return writer


def _event_files(folder: str | Path) -> set[Path]:
    return set(Path(folder).glob("events.out.tfevents.*"))


def writer_type() -> Any:
    """Return the class that writes events.

    Raises:
        MissingExtra: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing_extra("Writing TensorBoard events", "tensorboard", "tensorboard") from error
    return SummaryWriter


def _scalars(report: AuditResults, f: Finding) -> dict[str, float | None]:
    robust = {f"robust_accuracy/{clean(k)}": v for k, v in (f.robust_accuracy or {}).items()}
    return {
        "psnr_max": f.psnr and f.psnr.max,
        "patch_psnr_max": f.patch_psnr and f.patch_psnr.max,
        "gain": report.gain(f),
        "ssim_max": f.ssim and f.ssim.max,
        "identified": f.identified,
        "labels_correct": f.labels_correct,
        "clean_accuracy": f.clean_accuracy,
        **robust,
    }


def _images(f: Finding) -> Iterator[tuple[str, Tensor]]:
    """Yield what is to be shown by name, each (count, 3, height, width) in [0, 1]."""
    for name in ("original", "control", "reconstruction") if f.images else ():
        images = getattr(f.images, name)
        if images is not None:
            yield name, _pixels(images)
    for name in ("image", "magnified", "adversarial") if f.examples else ():
        yield name, torch.cat([_pixels(getattr(e, name)[None]) for e in f.examples])


def _pixels(images: Tensor) -> Tensor:
    shown = images.detach().float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
    return shown.expand(-1, 3, -1, -1)
