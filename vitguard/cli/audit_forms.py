"""The forms of an audit's report: where they go, that they are written, and what a gate says."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from vitguard.cli.output import console, shown
from vitguard.errors import expected

__all__ = ["DEFAULT_REPORT", "INTERRUPTED", "check_places", "deliver", "line_of"]

DEFAULT_REPORT = "vitguard-report.html"
INTERRUPTED = 130


def check_places(options: argparse.Namespace) -> None:
    """Refuse places where a form cannot be written, before the audit.

    Raises:
        InputError: Two forms in one file, a file that is read, or one that cannot be written.
    """
    from vitguard.files import check_writable

    json = None if options.json == "-" else options.json
    written = [path for path in (_html(options), json) if path]
    _check_apart(written, options)
    for path in written:
        check_writable(path)
    if options.tensorboard:
        from vitguard.tracking import check_writable_folder

        check_writable_folder(options.tensorboard)


def deliver(report: Any, options: argparse.Namespace) -> int:
    """Write and print a report as the options say; return the exit code.

    Raises:
        InputError: A form could not be written.
    """
    from vitguard.files import write_text

    html = _html(options)
    done: list[str] = []
    try:
        failed = _write(report, options, done)
        with shown():  # last: whoever reads it may leave, and the gate stays
            report.print_to(console(to_error=options.json == "-"))
            if options.json == "-":
                write_text(report.to_json_text(), "-")
    except KeyboardInterrupt:
        _tell(f"vitguard: interrupted; written: {', '.join(done) or 'nothing'}")
        return INTERRUPTED
    if failed:
        raise expected("reports that can be written", "; ".join(failed))
    if html:
        _tell(f"Report: {html}")
    if report.interrupted and options.max_psnr is None and options.max_gain is None:
        return INTERRUPTED
    if code := report.gate(options.max_psnr, options.max_gain):
        _say_why(report, options)
    return code


def line_of(error: BaseException) -> str:
    """Return an error as one line, without its full stop."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(".")


def _html(options: argparse.Namespace) -> str | None:
    return options.html or (None if options.json else DEFAULT_REPORT)


def _check_apart(written: list[str], options: argparse.Namespace) -> None:
    """Refuse to write one report over the other, or over a file that is read."""
    read = [options.checkpoint, options.before, options.update_file, *(options.images or ())]
    taken = {os.path.realpath(path) for path in read if path}
    for path in written:
        if (real := os.path.realpath(path)) in taken:
            raise expected("files of their own for --html and --json", f"{path} twice")
        taken.add(real)


def _write(report: Any, options: argparse.Namespace, done: list[str]) -> list[str]:
    """Write every form that was asked for, and return what failed: one takes no other with it.

    Args:
        done: Gets the paths as they are written.
    """
    from vitguard.files import write_text

    json = None if options.json == "-" else options.json
    forms: list[tuple[str | None, Any]] = [
        (json, lambda path: write_text(report.to_json_text(), path)),
        (_html(options), report.save),
        (options.tensorboard, report.to_tensorboard),
    ]
    failed = []
    for path, write in forms:
        if not path:
            continue
        try:
            write(path)
        except Exception as error:  # noqa: BLE001  whatever it is, the audit is done
            failed.append(f"{path} ({line_of(error)})")
        else:
            done.append(path)
    return failed


def _say_why(report: Any, options: argparse.Namespace) -> None:
    """Print what kept the report from passing its gate."""
    from vitguard.errors import LeakFound

    try:
        report.raise_if_leaks(options.max_psnr, options.max_gain)
    except LeakFound as found:
        _tell(f"vitguard: gate: {' '.join(str(found).split())}")


def _tell(text: str) -> None:
    with shown():
        print(text, file=sys.stderr)
