"""A report as a table for the terminal that fits 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitguard.report.results import AuditResults
from vitguard.report.words import (
    NOTHING,
    accuracies,
    baseline_text,
    caution,
    clean,
    decibels,
    remarks,
    share,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_to"]

STYLES = {
    "leaks": "bold red",
    "resisted": "cyan",
    "blocked": "magenta",
    "not applicable": "dim",
    "inconclusive": "yellow",
}


def print_to(report: AuditResults, console: Console) -> None:
    """Print headline, one block per defense and the baseline; no line is wider than 80 columns."""
    from rich.padding import Padding
    from rich.text import Text

    def say(text: str, style: str = "", indent: int = 0) -> None:
        console.print(Padding(Text(clean(text), style), (0, 0, 0, indent)), width=_width(console))

    say(f"{report.model.name}: {report.outcome()}", "bold")
    say(report.headline())
    console.print()
    heading = f"  {'attack':<16}{'verdict':<15}{'matched dB':>10}{'gain':>8}{'PSNR':>8}"
    console.print(Text(heading + f"{'ident.':>8}{'seconds':>9}", "dim"), no_wrap=True, crop=False)
    said: set[tuple[str, str]] = set()
    for defense, findings in report.configurations().items():
        control = all(map(report.is_control, findings))
        say("none (the undefended control)" if control else defense, "bold")
        for f in findings:
            line = Text(f"  {clean(f.attack):<16}", no_wrap=True)
            line.append(f"{f.verdict:<15}", STYLES[f.verdict])
            line.append(f"{decibels(f.patch_psnr and f.patch_psnr.max):>10}")
            line.append(f"{decibels(report.gain(f), signed=True):>8}")
            line.append(f"{decibels(f.psnr and f.psnr.max):>8}{share(f.identified):>8}")
            line.append(f"{NOTHING if f.seconds is None else f'{f.seconds:.2f}':>9}")
            console.print(line, crop=False)
            for remark in remarks(f):
                new = (f.attack, remark) not in said  # the first time is enough for a table
                if new or remark in (accuracies(f), caution(f)):
                    said.add((f.attack, remark))
                    say(remark, "dim", indent=4)
    console.print()
    say(baseline_text(report), "dim")
    for note in report.notes:
        say(f"Note: {note}", "dim")


def _width(console: Console) -> int:
    return min(console.width, 80)
