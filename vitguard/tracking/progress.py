"""A progress bar in the terminal, with the current estimate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitguard.tracking.truth import check_truth, scored

if TYPE_CHECKING:
    from vitguard.attacks.matching.progress import Progress

__all__ = ["ProgressBar", "thumbnail"]


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

        check_truth(truth)
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
                got = scored(images, self._truth, None)
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
