"""Advice on a terminal."""

from __future__ import annotations

from functools import partial

from rich.console import Console
from rich.table import Table

from vitguard.advise.report import AdviceReport, Applies, Option
from vitguard.report.console import between_words

__all__ = ["print_advice"]

_NAMED = 3  # stacks that are shown


def print_advice(report: AdviceReport, console: Console) -> None:
    """Print attacks, stacks, what is not covered, and the command."""
    say = partial(_say, console)
    if report.unsupported:
        return say(report.unsupported)
    hidden = "server and other clients" if report.see == "both" else report.see
    say(
        f"{report.model}: {report.tokens} tokens an image, {report.width} wide. Batch size "
        f"{report.batch_size}, setting {report.setting}, trained and sent: {report.train}; to be "
        f"hidden from: {hidden}",
        "bold",
    )
    for note in report.notes:
        say(f"Note: {note}")
    _print_attacks(console, report.attacks)
    _print_options(console, report.options)
    if report.fallen:
        say("Fell in the same measurements, each to the attack in brackets:", "bold")
        for stack, how in zip(report.fallen, report.fell_to, strict=True):
            say(f"  {stack} ({how})")
    say("Holds by a proof or by a key, whatever the attack:", "bold")
    for one in report.proven:
        say(f"  {one.stack}: {one.says}")
        say(f"    {one.verify}", whole=True)
    if not report.proven:
        say("  none that is installed and fits this model")
    say("What none of this rules out:", "bold")
    for line in report.uncovered:
        say(f"  - {line}")
    say(report.measured)
    say(f"What to use: {report.sentence()}", "bold")


def _print_attacks(console: Console, attacks: tuple[Applies, ...]) -> None:
    table = Table("attack", "applies here", "exact up to batch", "ends at batch")
    for a in attacks:
        table.add_row(
            a.attack,
            "[red]exactly[/]" if a.exact else "[yellow]in part[/]" if a.applies else "no",
            str(a.exact_until or "-"),
            str(a.ends_at or "never"),
        )
    console.print(table)
    _say(
        console,
        "Exactly: it gives the images themselves. In part: it gives what is said here. Plain: "
        "sent, and not encrypted.",
    )
    for a in attacks:
        if a.applies:
            _say(console, f"  {a.attack}: {a.reason}", "dim")


def _print_options(console: Console, options: tuple[Option, ...]) -> None:
    say = partial(_say, console)
    say("Stacks that stood where they were measured, the cheapest first:", "bold")
    if options:
        say(
            "  dB are counted from the thumbnail, the photo with each patch flat in its mean "
            "colour: below 0, less than that was recovered"
        )
    for option in options[:_NAMED]:
        say(f"  {option.stack}", "bold")
        say(f"    {option.evidence}")
        say(
            f"    on your model: at least {option.batch} image"
            f"{'s' if option.batch > 1 else ''} in each update; attacks whose equations would "
            f"still suffice: {', '.join(option.left) or 'none'}; hides images from: "
            f"{option.hides_from}"
        )
        if option.shows:
            say(f"    still shows: {option.shows}")
        say(f"    {option.verify}", whole=True)
    if not options:
        say("  none that was measured in full in this setting and fits this model")


def _say(console: Console, text: str, style: str = "", *, whole: bool = False) -> None:
    """Print a line, wrapped under its own indent; a command stays `whole`, to be copied."""
    indent = " " * (len(text) - len(text.lstrip(" -")))
    for line in [text] if whole else between_words(text, console.width, indent):
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
