"""What the page of a report shows: every number and sentence as text, for the template."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vitguard.report.finding import Finding, Summary, plain
from vitguard.report.inputs import own_controls, titles
from vitguard.report.pictures import Row, encode, panels, rows
from vitguard.report.results import AuditResults
from vitguard.report.words import clean, corridor_lines, decibels, remarks, share

__all__ = [
    "Attacked",
    "Card",
    "Figure",
    "Group",
    "Metric",
    "attacked_rows",
    "decibels_text",
    "groups",
]

SHOWN = 24
"""Images shown on the page, 1 to 4 for each finding, so that it stays a few MB."""

DASH = "\u2013"


@dataclass(frozen=True)
class Group:
    """A configuration: its spec (see `_spec`), what was attacked, and what each attack gave.

    `corridor` has a title and a sentence each: bound, reached, proved. `control` says whether it is
    the undefended one itself.
    """

    spec: list[str]
    exposure: str
    corridor: list[tuple[str, str]]
    cards: list[Card]
    control: bool


@dataclass(frozen=True)
class Card:
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
    strips: list[list[Figure]]
    more: str
    metrics: list[Metric]
    settings: list[tuple[str, str]]
    details: list[tuple[str, str]]


@dataclass(frozen=True)
class Metric:
    title: str
    value: str | None
    beside: str = ""


@dataclass(frozen=True)
class Figure:
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
class Attacked:
    """A row of the attacks on the input; cells are (accuracy, change beside the control)."""

    title: str
    spec: list[str]
    cells: list[tuple[str | None, str]]
    control: bool
    exposure: str = ""


def groups(report: AuditResults) -> list[Group]:
    measured = [f.patch_psnr.max for f in report.findings if f.patch_psnr and f.patch_psnr.finite]
    scale = max([1.0, *measured])
    pictured = sum(f.images is not None for f in report.findings)
    limit = min(max(SHOWN // max(pictured, 1), 1), 4)
    names = titles(report.findings)
    return [
        Group(
            spec=_spec(findings[0].defense),
            exposure=findings[0].exposure,
            corridor=corridor_lines(findings),
            cards=[_card(report, f, names[id(f)], scale, limit) for f in findings],
            control=all(map(report.is_control, findings)),
        )
        for findings in report.configurations().values()
    ]


def _spec(defense: str) -> list[str]:
    """Cut a spec where a line may break; the undefended control has no parts."""
    return [] if defense == "none" else re.split(r"(?<=[+,:])(?=\S)", clean(defense))


def _card(report: AuditResults, f: Finding, title: str, scale: float, limit: int) -> Card:
    value = f.patch_psnr.max if f.patch_psnr and f.patch_psnr.finite else None
    guessed = f.images is not None and f.images.reconstruction is not None
    shown = rows(f, limit if guessed else 1)
    total = f.images.count if f.images is not None else 0
    strips = [_strip(row, with_control=not report.is_control(f)) for row in shown]
    more = f"{len(shown)} of {total} images, the closest first." if total > len(shown) else ""
    return Card(
        attack=f.attack,
        title=title,
        verdict=f.verdict,
        meter="" if value is None else _meter(value, report.baseline.patch_psnr, scale),
        patch_psnr=decibels_text(value),
        gain=decibels_text(report.gain(f), signed=True),
        psnr=decibels_text(f.psnr and f.psnr.max),
        identified=None if f.identified is None else share(f.identified),
        seconds=_seconds(f),
        remarks=remarks(f),
        strips=strips + _triptychs(f),
        more=more if guessed else "",
        metrics=_metrics(report, f),
        settings=_pairs(f.settings),
        details=_pairs(f.details),
    )


def attacked_rows(
    every: Sequence[Finding], attacked: Iterable[Finding], bounds: Sequence[float | str]
) -> list[Attacked]:
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
        Attacked(
            title=names[id(f)],
            spec=_spec(f.defense),
            cells=[cell(f, bound) for bound in (None, *bounds)],
            control=not f.defended,  # what is withheld of an update changes no input
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


def _strip(row: Row, *, with_control: bool) -> list[Figure]:
    size = next((p.size for p in (row.original, row.control, row.reconstruction) if p), (1, 1))
    ratio = f"--ratio:{size[0]}/{size[1]}"

    def figure(title: str, picture: Image.Image | None, *captions: str, **more: Any) -> Figure:
        return _figure(title, row.name, picture, *captions, style=ratio, **more)

    figures = [figure("Original", row.original, row.name, otherwise="not known")]
    if with_control:
        figures.append(figure("Control", row.control, "no defense", _level(row.control_psnr)))
    return [*figures, figure("Reconstruction", row.reconstruction, _level(row.psnr))]


def _triptychs(f: Finding) -> list[list[Figure]]:
    targeted = bool(f.settings.get("targeted"))
    return [
        [_figure(p.title, "input", p.picture, p.remark) for p in panels(e, targeted=targeted)]
        for e in f.examples
    ]


def _figure(
    title: str, name: str, picture: Image.Image | None, *captions: str, **more: Any
) -> Figure:
    said = [caption for caption in captions if caption]
    alt = f"{title} of {name}"
    if picture is None:
        return Figure(title, alt, said, source=None, **more)
    data = base64.b64encode(encode(picture)).decode()
    return Figure(
        title,
        alt,
        said,
        source=f"data:image/png;base64,{data}",
        width=picture.width,
        height=picture.height,
        small=max(picture.size) < 200,
        **more,
    )


def _metrics(report: AuditResults, f: Finding) -> list[Metric]:
    def pair(title: str, summary: Summary | None, best: str, form: str) -> None:
        if summary is None:
            return
        worst, mean = plain(getattr(summary, best)), plain(summary.mean)
        if worst is None or mean is None:
            made.append(Metric(title, "not a number"))
        else:
            made.append(Metric(title, _minus(f"{worst:{form}}"), _minus(f"mean {mean:{form}}")))

    made: list[Metric] = []
    pair("PSNR, dB", f.psnr, "max", ".1f")
    pair("Matched-patch PSNR, dB", f.patch_psnr, "max", ".1f")
    if f.patch_psnr or f.gain:
        gain = decibels_text(report.gain(f), signed=True)
        made.append(Metric("Above the baseline", f"{gain or DASH} dB"))
    pair("SSIM", f.ssim, "max", ".3f")
    pair("MSE", f.mse, "min", ".1e")
    pair("FFT2D", f.fft2d, "min", ".2g")
    if f.identified is not None:
        decoys = f"among {f.decoys} decoys" if f.decoys is not None else ""
        made.append(Metric("Identified", share(f.identified), decoys))
    if f.labels_correct is not None:
        made.append(Metric("Labels correct", share(f.labels_correct)))
    if f.mask is not None:
        recall = f"recall {share(f.mask.recall)}"
        made.append(Metric("Shuffle mask, precision", share(f.mask.precision), recall))
    if f.control is not None and not report.is_control(f):
        psnr = f.control.psnr
        level = "" if psnr is None else f"{decibels_text(psnr.max) or DASH} dB"
        made.append(Metric("Control", f.control.verdict, level))
    if f.seconds is not None:
        made.append(Metric("Seconds per batch", _seconds(f)))
    return made


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in plain(values).items()]


def decibels_text(value: float | None, *, signed: bool = False) -> str | None:
    if value is None or not math.isfinite(value):
        return None
    return _minus(decibels(value, signed=signed))


def _level(value: float | None) -> str:
    return f"{level} dB" if (level := decibels_text(value)) else ""


def _seconds(f: Finding) -> str | None:
    if f.seconds is None or not math.isfinite(f.seconds):
        return None
    return f"{f.seconds:.2f}"


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")
