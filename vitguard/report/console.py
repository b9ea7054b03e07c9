"""A report as a table for the terminal that fits 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitguard.report.finding import Finding
from vitguard.report.results import AuditResults
from vitguard.report.words import (
    NOTHING,
    accuracies,
    baseline_text,
    caution,
    clean,
    corridor_lines,
    decibels,
    remarks,
    share,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["between_words", "print_to"]

NAME = 15
"""Columns for the name of an attack."""

STYLES = {
    "leaks": "bold red",
    "resisted": "cyan",
    "blocked": "magenta",
    "not applicable": "dim",
    "inconclusive": "yellow",
}


def print_to(report: AuditResults, console: Console) -> None:
    """Print headline, one block per defense and the baseline.

    No line is wider than 80 columns, unless the name of a model in the last one's command is.
    """
    from rich.text import Text

    def say(text: str, style: str = "", indent: int = 0) -> None:
        for line in Text(clean(text), style).wrap(console, min(console.width, 80) - indent):
            line.rstrip()
            console.print(Text(" " * indent).append_text(line), no_wrap=True, crop=False)

    say(f"{report.model.name}: {report.outcome()}", "bold")
    say(report.headline())
    console.print()
    heading = f"  {'attack':<16}{'verdict':<15}{'matched dB':>10}{'gain':>8}{'PSNR':>8}"
    console.print(Text(heading + f"{'ident.':>8}{'seconds':>9}", "dim"), no_wrap=True, crop=False)
    said: set[tuple[str, str]] = set()
    for configuration, findings in report.configurations().items():
        say(_heading(report, configuration, findings), "bold")
        for f in findings:
            name = Text(clean(f.attack))
            if name.cell_len > NAME:
                say(f.attack, indent=2)
                name = Text()
            console.print(_row(report, f, name), crop=False)
            for remark in remarks(f):
                new = (f.attack, remark) not in said  # the first time is enough for a table
                if new or f.verdict == "leaks" or remark in (accuracies(f), caution(f)):
                    said.add((f.attack, remark))
                    say(remark, "dim", indent=4)
        for title, sentence in corridor_lines(findings):
            say(f"{title}: {sentence}", indent=2)
    console.print()
    say(baseline_text(report), "dim")
    for note in report.notes:
        say(f"Note: {note}", "dim")
    if report.advice:
        for line in between_words(clean(f"What to use: {report.advice}"), min(console.width, 80)):
            console.print(Text(line, "bold"), soft_wrap=True)


def between_words(text: str, width: int, indent: str = "") -> list[str]:
    """Return lines of a text, broken between words alone: a command's can be copied.

    Args:
        indent: Of all lines but the first.
    """
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _heading(report: AuditResults, configuration: str, findings: Sequence[Finding]) -> str:
    if findings[0].defended:
        return configuration
    control = all(map(report.is_control, findings))
    return f"{configuration} ({'the undefended control' if control else 'tensors withheld'})"


def _row(report: AuditResults, f: Finding, name: Text) -> Text:
    """Return the line of a finding; an attack with a longer name has it on the line above."""
    from rich.text import Text

    line = Text("  ", no_wrap=True).append_text(name)
    line.append(" " * (NAME + 1 - name.cell_len))
    line.append(f"{f.verdict:<15}", STYLES[f.verdict])
    line.append(f"{decibels(f.patch_psnr and f.patch_psnr.max):>10}")
    line.append(f"{decibels(report.gain(f), signed=True):>8}")
    line.append(f"{decibels(f.psnr and f.psnr.max):>8}{share(f.identified):>8}")
    line.append(f"{NOTHING if f.seconds is None else f'{f.seconds:.2f}':>9}")
    return line
