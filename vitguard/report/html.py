"""The audit report as one HTML page: no script, no request, readable on a phone and in the dark.

This file chooses what is shown and writes the numbers; `report.html.jinja` is the page. Jinja
escapes every value: the only markup that passes is the template's own and the style sheet.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from vitguard.report.finding import MEANINGS, Finding, Summary, plain
from vitguard.report.inputs import own_controls, titles
from vitguard.report.pictures import Row, encode, epsilon_text, panels, rows
from vitguard.report.results import AuditResults
from vitguard.report.words import baseline_text, clean, decibels, remarks, share, threat_text

__all__ = ["to_html"]

SHOWN = 24
"""Images shown on the page, 1 to 4 for each finding, so that it stays a few MB."""

NAMED = 12
"""Images that the header names."""

DASH = "\u2013"


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
        withheld=bool(report.threat.get("withheld")),
        groups=_groups(report),
        baseline=_decibels(report.baseline.patch_psnr),
        bounds=[epsilon_text(b) for b in bounds],
        attacked=_attacked(report.findings, attacked, bounds),
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


@dataclass(frozen=True)
class _Group:
    """A configuration: its spec (see `_spec`) and what each attack gave."""

    spec: list[str]
    cards: list[_Card]


@dataclass(frozen=True)
class _Card:
    """A finding: its row in the overview and its card; a value of None was not measured."""

    attack: str
    title: str
    verdict: str
    meter: str
    patch_psnr: str | None
    gain: str | None
    psnr: str | None
    identified: str | None
    seconds: str | None
    remarks: list[str]
    strips: list[list[_Figure]]
    more: str
    metrics: list[_Metric]
    settings: list[tuple[str, str]]
    details: list[tuple[str, str]]


@dataclass(frozen=True)
class _Metric:
    title: str
    value: str | None
    beside: str = ""


@dataclass(frozen=True)
class _Figure:
    """A picture with its caption, or a box that says why there is none."""

    title: str
    alt: str
    captions: list[str]
    source: str | None
    width: int = 0
    height: int = 0
    small: bool = False
    style: str = ""
    otherwise: str = "nothing"


@dataclass(frozen=True)
class _Attacked:
    """A row of the attacks on the input; cells are (accuracy, change beside the control)."""

    title: str
    spec: list[str]
    cells: list[tuple[str | None, str]]


def _groups(report: AuditResults) -> list[_Group]:
    measured = [f.patch_psnr.max for f in report.findings if f.patch_psnr and f.patch_psnr.finite]
    scale = max([1.0, *measured])
    pictured = sum(f.images is not None for f in report.findings)
    limit = min(max(SHOWN // max(pictured, 1), 1), 4)
    names = titles(report.findings)
    return [
        _Group(
            spec=_spec(defense),
            cards=[_card(report, f, names[id(f)], scale, limit) for f in findings],
        )
        for defense, findings in report.configurations().items()
    ]


def _spec(defense: str) -> list[str]:
    """Cut a spec where a line may break; the undefended control has no parts."""
    return [] if defense == "none" else re.split(r"(?<=[+,:])(?=\S)", clean(defense))


def _card(report: AuditResults, f: Finding, title: str, scale: float, limit: int) -> _Card:
    value = f.patch_psnr.max if f.patch_psnr and f.patch_psnr.finite else None
    guessed = f.images is not None and f.images.reconstruction is not None
    shown = rows(f, limit if guessed else 1)
    total = f.images.count if f.images is not None else 0
    strips = [_strip(row, with_control=not report.is_control(f)) for row in shown]
    more = f"{len(shown)} of {total} images, the closest first." if total > len(shown) else ""
    return _Card(
        attack=f.attack,
        title=title,
        verdict=f.verdict,
        meter="" if value is None else _meter(value, report.baseline.patch_psnr, scale),
        patch_psnr=_decibels(value),
        gain=_decibels(report.gain(f), signed=True),
        psnr=_decibels(f.psnr and f.psnr.max),
        identified=None if f.identified is None else share(f.identified),
        seconds=_seconds(f),
        remarks=remarks(f),
        strips=strips + _triptychs(f),
        more=more if guessed else "",
        metrics=_metrics(report, f),
        settings=_pairs(f.settings),
        details=_pairs(f.details),
    )


def _attacked(
    every: Sequence[Finding], attacked: Iterable[Finding], bounds: Sequence[float | str]
) -> list[_Attacked]:
    """How each defense changes what an attack on the input does: one row beside the other."""
    names, controls = titles(every), own_controls(every)

    def cell(f: Finding, bound: float | str | None) -> tuple[str | None, str]:
        mine, alone = _accuracy(f, bound), _accuracy(controls.get(id(f)), bound)
        if mine is None:
            return None, ""
        if not f.defended or alone is None:
            return share(mine), ""
        return share(mine), _minus(f"{100 * (mine - alone):+.0f}")

    return [
        _Attacked(
            title=names[id(f)],
            spec=_spec(f.defense),
            cells=[cell(f, bound) for bound in (None, *bounds)],
        )
        for f in attacked
    ]


def _accuracy(f: Finding | None, bound: float | str | None) -> float | None:
    """Return the accuracy at a bound on the change; without a bound, on clean images."""
    if f is None:
        return None
    return f.clean_accuracy if bound is None else (f.robust_accuracy or {}).get(bound)


def _meter(value: float, floor: float, scale: float) -> str:
    def percent(number: float) -> str:
        inside = min(max(number / scale, 0.0), 1.0) if math.isfinite(number) else 0.0
        return f"{100 * inside:.1f}%"

    return f"--value:{percent(value)};--floor:{percent(floor)}"


def _strip(row: Row, *, with_control: bool) -> list[_Figure]:
    size = next((p.size for p in (row.original, row.control, row.reconstruction) if p), (1, 1))
    ratio = f"--ratio:{size[0]}/{size[1]}"

    def figure(title: str, picture: Image.Image | None, *captions: str, **more: Any) -> _Figure:
        return _figure(title, row.name, picture, *captions, style=ratio, **more)

    figures = [figure("Original", row.original, row.name, otherwise="not known")]
    if with_control:
        figures.append(figure("Control", row.control, "no defense", _level(row.control_psnr)))
    return [*figures, figure("Reconstruction", row.reconstruction, _level(row.psnr))]


def _triptychs(f: Finding) -> list[list[_Figure]]:
    targeted = bool(f.settings.get("targeted"))
    return [
        [_figure(p.title, "input", p.picture, p.remark) for p in panels(e, targeted=targeted)]
        for e in f.examples
    ]


def _figure(
    title: str, name: str, picture: Image.Image | None, *captions: str, **more: Any
) -> _Figure:
    said = [caption for caption in captions if caption]
    alt = f"{title} of {name}"
    if picture is None:
        return _Figure(title, alt, said, source=None, **more)
    data = base64.b64encode(encode(picture)).decode()
    return _Figure(
        title,
        alt,
        said,
        source=f"data:image/png;base64,{data}",
        width=picture.width,
        height=picture.height,
        small=max(picture.size) < 200,
        **more,
    )


def _metrics(report: AuditResults, f: Finding) -> list[_Metric]:
    def pair(title: str, summary: Summary | None, best: str, form: str) -> None:
        if summary is None:
            return
        worst, mean = plain(getattr(summary, best)), plain(summary.mean)
        if worst is None or mean is None:
            made.append(_Metric(title, "not a number"))
        else:
            made.append(_Metric(title, _minus(f"{worst:{form}}"), _minus(f"mean {mean:{form}}")))

    made: list[_Metric] = []
    pair("PSNR, dB", f.psnr, "max", ".1f")
    pair("Matched-patch PSNR, dB", f.patch_psnr, "max", ".1f")
    if f.patch_psnr or f.gain:
        gain = _decibels(report.gain(f), signed=True)
        made.append(_Metric("Above the baseline", f"{gain or DASH} dB"))
    pair("SSIM", f.ssim, "max", ".3f")
    pair("MSE", f.mse, "min", ".1e")
    pair("FFT2D", f.fft2d, "min", ".2g")
    if f.identified is not None:
        decoys = f"among {f.decoys} decoys" if f.decoys is not None else ""
        made.append(_Metric("Identified", share(f.identified), decoys))
    if f.labels_correct is not None:
        made.append(_Metric("Labels correct", share(f.labels_correct)))
    if f.mask is not None:
        recall = f"recall {share(f.mask.recall)}"
        made.append(_Metric("Shuffle mask, precision", share(f.mask.precision), recall))
    if f.control is not None and not report.is_control(f):
        psnr = f.control.psnr
        level = "" if psnr is None else f"{_decibels(psnr.max) or DASH} dB"
        made.append(_Metric("Control", f.control.verdict, level))
    if f.seconds is not None:
        made.append(_Metric("Seconds per batch", _seconds(f)))
    return made


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in plain(values).items()]


def _decibels(value: float | None, *, signed: bool = False) -> str | None:
    if value is None or not math.isfinite(value):
        return None
    return _minus(decibels(value, signed=signed))


def _level(value: float | None) -> str:
    return f"{level} dB" if (level := _decibels(value)) else ""


def _seconds(f: Finding) -> str | None:
    if f.seconds is None or not math.isfinite(f.seconds):
        return None
    return f"{f.seconds:.2f}"


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")
