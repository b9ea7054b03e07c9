"""Advice on a terminal."""

from __future__ import annotations

import textwrap
from functools import partial

from rich.console import Console
from rich.table import Table

from vitguard.advise.report import AdviceReport, Applies, Option

__all__ = ["print_advice"]

_NAMED = 3  # stacks that are shown


def print_advice(report: AdviceReport, console: Console) -> None:
    """Print attacks, stacks, what is not covered, and the command."""
    say = partial(_say, console)
    if report.unsupported:
        return say(report.unsupported)
    say(
        f"{report.model}, batch size {report.batch_size}, {report.setting}, "
        f"trained: {report.train}, seen by: {report.see}; "
        f"{report.tokens} tokens an image, {report.width} wide",
        "bold",
    )
    for note in report.notes:
        say(f"Note: {note}")
    _print_attacks(console, report.attacks)
    _print_options(console, report.options)
    if report.fallen:
        say("Fell:")
        for stack, how in zip(report.fallen, report.fell_to, strict=True):
            say(f"  {stack} ({how})")
    say("What holds by proof or by a key, whatever the attack:", "bold")
    for one in report.proven:
        say(f"  {one.stack}: {one.says}")
        say(f"    {one.verify}", whole=True)
    say("What no known attack or proof covers:", "bold")
    for line in report.uncovered:
        say(f"  {line}")
    say(report.measured)
    say(report.sentence(), "bold")


def _print_attacks(console: Console, attacks: tuple[Applies, ...]) -> None:
    table = Table("attack", "applies", "exact up to batch", "ends at batch")
    for a in attacks:
        table.add_row(
            a.attack,
            "[red]exactly[/]" if a.exact else "[yellow]in part[/]" if a.applies else "no",
            str(a.exact_until or "-"),
            str(a.ends_at or "none"),
        )
    console.print(table)
    for a in attacks:
        if a.exact:
            _say(console, f"  {a.attack}: {a.reason}", "dim")


def _print_options(console: Console, options: tuple[Option, ...]) -> None:
    say = partial(_say, console)
    say("Stacks that stood where they were measured, the cheapest first:", "bold")
    for option in options[:_NAMED]:
        say(f"  {option.stack}", "bold")
        say(f"    {option.evidence}")
        counts = ", ".join(option.left) or "no exact attack's"
        say(
            f"    here: at least {option.batch} images an update; counts that hold then: "
            f"{counts}; hides from: {option.hides_from}"
        )
        if option.shows:
            say(f"    still shows: {option.shows}")
        say(f"    {option.verify}", whole=True)
    if not options:
        say("  none that was measured in full in this setting and fits this model")


def _say(console: Console, text: str, style: str = "", *, whole: bool = False) -> None:
    """Print a line, wrapped under its own indent; a command stays `whole`, to be copied."""
    indent = " " * (len(text) - len(text.lstrip()))
    lines = (
        [text]
        if whole
        else textwrap.wrap(text, console.width, subsequent_indent=indent, break_on_hyphens=False)
    )
    for line in lines:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
