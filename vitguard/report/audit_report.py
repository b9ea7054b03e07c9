"""The report of an audit: what was found, in the forms people and programs read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitguard.report.results import AuditResults

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

__all__ = ["AuditReport"]


@dataclass(frozen=True)
class AuditReport(AuditResults):
    """Everything an audit found, and its forms: JSON, Markdown, HTML, PNG, TensorBoard, console.

    Args:
        model: The audited model.
        images: Names of the images.
        batch_size: Images behind one update.
        baseline: The no-information baseline.
        findings: One per defense and attack, the undefended control among them.
        weights: `"random initialisation"`, `"checkpoint FILE"`, ...
        update: The kind of update in words, such as `"one gradient"`.
        seed: The seed of the run.
        threat: What the adversary was granted or denied (`"withheld"`: selectors); JSON values.
        families_not_run: Attack families that were left out.
        notes: Anything a reader must know, such as labels that were made up.
        interrupted: Whether a keyboard interrupt ended it early; findings say what is missing.
        advice: What `vitguard advise` says of this model and batch, in one sentence; "" without.
        version: vitguard's version.
    """

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values (schema 1); a missing value is None."""
        from vitguard.report.json import to_json

        return to_json(self)

    def to_json_text(self) -> str:
        """Return `to_json` as text; pure ASCII."""
        from vitguard.report.json import to_json_text

        return to_json_text(self)

    def to_markdown(self) -> str:
        """Return the report as GitHub-flavoured Markdown, without pictures."""
        from vitguard.report.markdown import to_markdown

        return to_markdown(self)

    def to_html(self) -> str:
        """Return the report as one HTML page that loads nothing and runs no script."""
        from vitguard.report.html import to_html

        return to_html(self)

    def to_png(self) -> Image.Image:
        """Return the pictures as one grid: original, control, reconstruction.

        Raises:
            InputError: No finding holds pictures.
        """
        from vitguard.report.png import to_png

        return to_png(self)

    def print_to(self, console: Console) -> None:
        """Print the report as a table that fits 80 columns."""
        from vitguard.report.console import print_to

        print_to(self, console)

    def to_tensorboard(self, directory: str | Path, *, step: int = 0) -> None:
        """Write scalars, pictures and the Markdown text as TensorBoard events.

        They show the images: a new file of events is readable by its owner alone.

        Raises:
            MissingExtra: TensorBoard is not installed.
            InputError: `directory` cannot be a folder.
        """
        from vitguard.report.tensorboard import to_tensorboard

        to_tensorboard(self, directory, step=step)

    def save(self, path: str | Path) -> None:
        """Write the report in the form that the suffix names: .json, .md, .html or .png; atomic.

        HTML and PNG show the images: such a file is readable by its owner alone.

        Raises:
            InputError: Another suffix, or a path that cannot be written.
        """
        from vitguard.report.forms import save

        save(self, path)
