"""A running attack, a training run and its audits as TensorBoard events."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitguard.core import Normalization
from vitguard.errors import InputError, expected
from vitguard.report.tensorboard import open_writer, write_report, writer_type
from vitguard.tracking.pictures import beside, shuffled_at, what_the_model_saw
from vitguard.tracking.truth import check_same, check_truth, scored

if TYPE_CHECKING:
    from vitguard.attacks.matching.progress import Progress
    from vitguard.guard import Guard
    from vitguard.report.audit_report import AuditReport

__all__ = ["TensorBoard", "check_writable_folder"]


class TensorBoard:
    """Writes a running attack, a training run and its audits as TensorBoard events.

    Give it to an attack as `watch`; call `training` in a loop of one's own; call `audit` whenever
    there is a report. It is a context manager; `close` flushes.

    Args:
        folder: Where the events go.
        truth: The images an attack is after, pixels in [0, 1] of shape (batch, channels, height,
            width); with it PSNR is written.
        patch_size: (height, width) of a patch, for the matched PSNR.
        every: Iterations between pictures of an attack, and PSNR values.

    Examples:
        >>> attack = InvertingGradients.fast(watch=TensorBoard("runs/attack"))  # doctest: +SKIP
        >>> with TensorBoard("runs/training") as board:  # doctest: +SKIP
        ...     board.training(guard, step=0, losses={"task": 2.3}, images=images)

    Raises:
        MissingExtra: TensorBoard is not installed.
        InputError: The folder cannot be written, or `truth` is no such batch of images.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        truth: Tensor | None = None,
        patch_size: tuple[int, int] | None = None,
        every: int = 50,
    ) -> None:
        if every < 1:
            raise expected("every of at least 1", every)
        check_truth(truth)
        check_writable_folder(folder)
        self._writer = open_writer(folder)
        self._truth = truth
        self._patch = patch_size
        self._every = every
        self._started: set[str] = set()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, progress: Progress) -> None:
        """Take one iteration of an attack: loss terms, PSNR and pictures over time, settings."""
        name, step = progress.attack, progress.iteration
        if name not in self._started:
            self._started.add(name)
            rows = "\n".join(f"| {k} | {v} |" for k, v in progress.settings.items())
            self._writer.add_text(f"{name}/settings", f"| setting | value |\n|---|---|\n{rows}")
            if self._truth is not None:
                check_same(progress.estimate(), self._truth)
                self._writer.add_images(f"{name}/truth", self._truth.clamp(0, 1), 0)
        for term, value in progress.terms.items():
            self._writer.add_scalar(f"{name}/{term}", value, step)
        if step % self._every and step not in (1, progress.iterations):
            return
        images = progress.estimate()
        self._writer.add_images(f"{name}/estimate", images, step)
        if self._truth is not None:
            patch = self._patch or (1, 1)
            got = scored(images, self._truth, self._patch)
            self._writer.add_scalar(f"{name}/psnr", got.psnr.mean().item(), step)
            if patch != (1, 1):
                self._writer.add_scalar(f"{name}/patch psnr", got.patch_psnr.mean().item(), step)

    def training(
        self,
        guard: Guard,
        *,
        step: int,
        losses: Mapping[str, float | Tensor],
        values: Mapping[str, float | Tensor] | None = None,
        images: Tensor | None = None,
        normalization: Normalization | None = None,
        most: int = 8,
    ) -> None:
        """Take one step of a user's own training loop.

        Writes the losses, the privacy spent so far (a curve for each defense that bounds it, of one
        record or of a whole client), and, when images are given, each beside what the model saw of
        it: shuffled patches at the places they were moved to. Call it before `model.eval()`: then
        the model sees images as they are. These pictures show training data: keep the folder as
        private as the data.

        Args:
            guard: The guard of the model that is trained.
            losses: By name.
            values: What else to plot, by name, such as the accuracy.
            images: The step's model input, shape (batch, channels, height, width).
            normalization: From pixels to the model's input, to show the images in their colours.
            most: Images shown.
        """
        for name, value in losses.items():
            self._writer.add_scalar(f"training/loss {name}", float(value), step)
        for name, value in (values or {}).items():
            self._writer.add_scalar(f"training/{name}", float(value), step)
        epsilons = _epsilons(guard)
        for name, epsilon in epsilons.items():
            of = f" {name}" if len(epsilons) > 1 else ""
            self._writer.add_scalar(f"training/epsilon{of}", epsilon, step)
        if images is not None:
            seen = what_the_model_saw(guard, images)
            pairs = beside(images[:most], seen[:most], normalization)
            self._writer.add_image("training/what the model saw", pairs, step)

    def shuffle_figure(
        self,
        guard: Guard,
        images: Tensor,
        *,
        step: int,
        ratio: float = 0.7,
        generator: torch.Generator | None = None,
        normalization: Normalization | None = None,
        most: int = 8,
    ) -> None:
        """Show each image beside itself with a share of its patches shuffled.

        A figure of what a patch shuffle does at this ratio, whatever the guard's stack is. It shows
        training data, and its draw is its own: no secret one is used.

        Args:
            images: Model input, shape (batch, channels, height, width).
            ratio: Share of the patches in [0, 1].
            generator: For the figure's draw.
            normalization: From pixels to the model's input, to show the images in their colours.
            most: Images shown.
        """
        shuffled = shuffled_at(guard, images[:most], ratio, generator=generator)
        pairs = beside(images[:most], shuffled, normalization)
        self._writer.add_image(f"training/shuffled at {100 * ratio:.0f} %", pairs, step)

    def audit(self, report: AuditReport, *, step: int) -> None:
        """Take an audit of the model as it is at `step`: one curve for each defense and attack.

        Tags, pictures and text are those of `AuditReport.to_tensorboard`. The pictures show what
        was reconstructed, and the images it is compared with.
        """
        write_report(self._writer, report, step)

    def close(self) -> None:
        """Write everything out and close the file."""
        self._writer.close()


def check_writable_folder(folder: str | Path) -> None:
    """Check, before a long run, that TensorBoard events can be written; nothing is left behind.

    Raises:
        MissingExtra: TensorBoard is not installed.
        InputError: The folder cannot be written or made.
    """
    writer_type()
    if "://" in str(folder):  # a file system of TensorBoard's own
        return
    target = Path(folder)
    try:
        existing = next(p for p in (target, *target.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise expected("a folder for TensorBoard", f"{folder} ({error.strerror})") from error


def _epsilons(guard: Guard) -> dict[str, float]:
    """Return what each defense that gives a privacy guarantee has spent, by its name."""
    spent = {}
    for defense in guard.defenses:
        try:
            spent[defense.name] = float(guard.privacy_spent(defense.name).epsilon)
        except InputError:  # this one gives none
            continue
    return spent
