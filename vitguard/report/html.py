"""The audit report as one HTML page: no script, no request, readable on a phone and in the dark.

`page.py` says what is shown, `report.html.jinja` where. Jinja escapes every value: the only markup
that passes is the template's own and the style sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import jinja2
from markupsafe import Markup

from vitguard.report.finding import MEANINGS
from vitguard.report.page import attacked_rows, decibels_text, groups
from vitguard.report.pictures import epsilon_text
from vitguard.report.results import AuditResults
from vitguard.report.words import baseline_text, clean, threat_text

__all__ = ["to_html"]

NAMED = 12
"""Images that the header names."""


def to_html(report: AuditResults) -> str:
    """Return the page."""
    attacked = [f for f in report.findings if f.robust_accuracy]
    bounds = list(dict.fromkeys(e for f in attacked for e in f.robust_accuracy or {}))
    name, _, arguments = report.model.name.partition(":")
    facts = {
        "Model": name,
        "Weights": report.weights,
        "Update": report.update,
        "Batch size": report.batch_size,
        "Images": _names(report.images),
        "Attack families not run": ", ".join(report.families_not_run) or "none",
    }
    return _template().render(
        report=report,
        style=Markup(_file("report.css")),  # a file of this package
        facts=facts.items(),
        arguments=arguments.replace(",", ", "),
        parameters=f"{report.model.parameters:,}".split(","),
        groups=groups(report),
        baseline=decibels_text(report.baseline.patch_psnr),
        bounds=[epsilon_text(b) for b in bounds],
        attacked=attacked_rows(report.findings, attacked, bounds),
        meanings=MEANINGS,
        baseline_text=baseline_text(report),
        threat_text=threat_text(report.threat),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_cleaned,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in ("safe", "xmlattr", "tojson", "urlize"):  # filters that pass markup on unescaped
        del environment.filters[name]
    return environment.get_template("report.html.jinja")


def _file(name: str) -> str:
    return resources.files("vitguard.report").joinpath(name).read_text("utf-8")


def _cleaned(value: object) -> object:
    """Return what stands in double braces as clean text; escaping follows."""
    return value if isinstance(value, Markup) else clean(value)


def _names(images: Sequence[str]) -> str:
    shown = ", ".join(images[:NAMED])
    more = len(images) - NAMED
    return f"{shown} and {more} more" if more > 0 else shown or "not named"
