"""The forms a report is saved in, by the suffix of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from vitguard.errors import expected
from vitguard.files import write_atomically
from vitguard.report.html import to_html
from vitguard.report.json import to_json_text
from vitguard.report.markdown import to_markdown
from vitguard.report.png import to_png_bytes
from vitguard.report.results import AuditResults

__all__ = ["FORMS", "save"]

FORMS: Mapping[str, Callable[[AuditResults], bytes | str]] = {
    ".json": to_json_text,
    ".md": to_markdown,
    ".html": to_html,
    ".png": to_png_bytes,
}
PICTURED = (".html", ".png")
"""Forms that show the images, and what attacks made of them."""


def save(report: AuditResults, path: str | Path) -> None:
    """Write the report in the form that the suffix names; atomic.

    Forms with pictures hold true images: their owner alone may read them.

    Raises:
        InputError: Another suffix, or a path that cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMS:
        raise expected(f"a report file ending in {', '.join(FORMS)}", path)
    write_atomically(path, FORMS[suffix](report), private=suffix in PICTURED)
