"""Watching attacks and training runs: TensorBoard, and a progress bar with the current estimate."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitguard.core import Normalization
from vitguard.errors import InputError, expected
from vitguard.metrics import Scores, score
from vitguard.report.tensorboard import open_writer, write_report, writer_type

if TYPE_CHECKING:
    from vitguard.attacks.matching.run import Progress
    from vitguard.guard import Guard
    from vitguard.report.audit_report import AuditReport

__all__ = ["ProgressBar", "TensorBoard", "check_writable_folder"]


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
        _check_truth(truth)
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
                _check_same(progress.estimate(), self._truth)
                self._writer.add_images(f"{name}/truth", self._truth.clamp(0, 1), 0)
        for term, value in progress.terms.items():
            self._writer.add_scalar(f"{name}/{term}", value, step)
        if step % self._every and step not in (1, progress.iterations):
            return
        images = progress.estimate()
        self._writer.add_images(f"{name}/estimate", images, step)
        if self._truth is not None:
            patch = self._patch or (1, 1)
            got = _scored(images, self._truth, self._patch)
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
            pairs = _beside(images[:most], seen[:most], normalization)
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
        pairs = _beside(images[:most], shuffled, normalization)
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


def _check_truth(truth: Tensor | None) -> None:
    if truth is None:
        return
    shaped = truth.dim() == 4 and truth.shape[1] in (1, 3) and truth.numel()
    if not shaped or not truth.is_floating_point():
        raise expected(
            "truth as floating pixels of shape (batch, 1 or 3, height, width)",
            f"{truth.dtype} of shape {tuple(truth.shape)}",
        )
    low, high = (float(value) for value in truth.detach().aminmax())
    if not (low > -0.01 and high < 1.01):  # resizing oversteps a little; normalised input by far
        raise expected("truth as pixels in [0, 1]", f"[{low:.3g}, {high:.3g}]")


def _check_same(images: Tensor, truth: Tensor) -> None:
    if images.shape != truth.shape:
        raise expected(
            f"truth of the images that are attacked, shape {tuple(images.shape)}",
            tuple(truth.shape),
        )


def _scored(images: Tensor, truth: Tensor, patch_size: tuple[int, int] | None) -> Scores:
    _check_same(images, truth)
    height, width = images.shape[-2:]
    return score(images, truth, patch_size or (height, width))


def what_the_model_saw(guard: Guard, images: Tensor) -> Tensor:
    """Return the images with patches where the last draw of a shuffle moved them.

    As they are if the model is not training: nothing is shuffled then.
    """
    source = guard.truth().get("source") if guard.model.training else None
    if source is None or source.shape[0] != len(images):
        return images.detach()
    patches = guard.anatomy.patchify(images.detach())
    source = source.to(patches.device)[..., None].expand_as(patches)
    return guard.anatomy.unpatchify(patches.gather(1, source))


def shuffled_at(
    guard: Guard, images: Tensor, ratio: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Return the images with a share of their patches permuted by a draw of its own."""
    from vitguard.defenses.shuffle import masks
    from vitguard.draws import Draws

    if not 0 <= ratio <= 1:
        raise expected("ratio in [0, 1]", ratio)
    anatomy = guard.anatomy
    draws = Draws(generator or torch.Generator().manual_seed(0))
    keys = draws.keys(len(images))
    mask = masks.uniform_masks(draws, keys, anatomy.patches, int(ratio * anatomy.patches + 1e-9))
    source = masks.permute_inside(draws, keys, mask).to(images.device)
    patches = anatomy.patchify(images.detach())
    return anatomy.unpatchify(patches.gather(1, source[..., None].expand_as(patches)))


def _beside(left: Tensor, right: Tensor, normalization: Normalization | None) -> Tensor:
    """Return one picture, a row for each image: it, and the other version of it."""
    pairs = torch.cat(list(torch.cat([left.detach(), right], dim=-1)), dim=-2)
    pixels = normalization.invert(pairs) if normalization is not None else pairs
    return pixels.clamp(0, 1).cpu()


def _epsilons(guard: Guard) -> dict[str, float]:
    """Return what each defense that gives a privacy guarantee has spent, by its name."""
    spent = {}
    for defense in guard.defenses:
        try:
            spent[defense.name] = float(guard.privacy_spent(defense.name).epsilon)
        except InputError:  # this one gives none
            continue
    return spent


class ProgressBar:
    """A bar in the terminal with loss, time left, and a thumbnail of the current estimate.

    Give it to an attack as `watch`. It is a context manager, which leaves the terminal clean.

    Args:
        truth: The images an attack is after, pixels in [0, 1] of shape (batch, channels, height,
            width); with it the PSNR is shown.
        every: Iterations between thumbnails; 0 shows none.
        console: A rich console; standard error by default.

    Raises:
        InputError: `truth` is no such batch of images.
    """

    def __init__(
        self, *, truth: Tensor | None = None, every: int = 10, console: Any = None
    ) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        _check_truth(truth)
        self._truth, self._every = truth, every
        console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=console)
        self._live = Live(self._bar, console=console, refresh_per_second=4)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressBar:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Take one iteration of an attack."""
        from rich.console import Group

        name = progress.attack
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=progress.iterations, note="")
        note = f"distance {progress.terms.get('distance', float('nan')):.4g}"
        if self._every and (progress.iteration % self._every == 0 or progress.iteration == 1):
            images = progress.estimate()
            if self._truth is not None:
                got = _scored(images, self._truth, None)
                note += f", PSNR {got.psnr.mean():.1f} dB"
            self._live.update(Group(self._bar, thumbnail(images[0])))
        self._bar.update(self._tasks[name], completed=progress.iteration, note=note)


def thumbnail(image: Tensor, columns: int = 32) -> Any:
    """Return an image as coloured half blocks, two pixels a character, for a rich console.

    Args:
        image: Pixels in [0, 1], shape (1 or 3, height, width).
        columns: Characters across.
    """
    from rich.text import Text

    height, width = image.shape[-2:]
    rows = max(2, round(columns * height / width / 2) * 2)
    small = torch.nn.functional.interpolate(
        image[None].detach().float().cpu(), (rows, columns), mode="area"
    )[0]
    values = (small.expand(3, -1, -1).clamp(0, 1) * 255).round().int().permute(1, 2, 0).tolist()
    text = Text()
    for upper, lower in zip(values[::2], values[1::2], strict=True):
        for top, bottom in zip(upper, lower, strict=True):
            text.append("▀", style=f"rgb({_rgb(top)}) on rgb({_rgb(bottom)})")
        text.append("\n")
    return text


def _rgb(pixel: list[int]) -> str:
    return ",".join(map(str, pixel))
