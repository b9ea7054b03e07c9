"""The audit report as one HTML page: no script, no request, readable on a phone and in the dark."""

from __future__ import annotations

import base64
import html
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from PIL import Image

from vitguard.attacks.base import Triptych
from vitguard.report.finding import MEANINGS, Finding, Summary, plain
from vitguard.report.pictures import Row, encode, epsilon_text, panels, rows
from vitguard.report.words import baseline_text, clean, decibels, remarks, share, threat_text

if TYPE_CHECKING:
    from vitguard.report.audit_report import AuditReport

__all__ = ["to_html"]

SHOWN = 24
"""Images shown on the page, 1 to 4 for each finding, so that it stays a few MB."""

NAMED = 12
"""Images that the header names."""

NOTHING = '<span class="quiet" title="not measured">\u2013</span>'

# The text names the verdict; the shape repeats it for whoever does not see the colour.
SHAPES = {
    "leaks": '<path d="M8 1l7 13H1z"/>',
    "resisted": '<circle cx="8" cy="8" r="6"/>',
    "blocked": '<rect x="2" y="2" width="12" height="12"/><path d="M2 14L14 2"/>',
    "not applicable": '<path d="M2 8h12"/>',
    "inconclusive": '<path d="M2 8q3-7 6 0t6 0"/>',
}

# Held by the browser too: this page can load nothing and run nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def to_html(report: AuditReport) -> str:
    """Return the page."""
    style = resources.files("vitguard.report").joinpath("report.css").read_text("utf-8")
    pictured = sum(f.images is not None for f in report.findings)
    limit = min(max(SHOWN // max(pictured, 1), 1), 4)
    sections = "".join(
        _configuration(report, defense, findings, limit)
        for defense, findings in report.configurations().items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vitguard audit of {_text(report.model.name)}</title>
<style>{style}</style>
</head>
<body>
<div class="page">
{_header(report)}
<main>
<h2 id="overview">Overview</h2>
{_overview(report)}
{_robustness(report)}
{sections}
{_guide(report)}
</main>
<footer>vitguard {_text(report.version)}, seed {_text(report.seed)}.</footer>
</div>
</body>
</html>
"""


def _header(report: AuditReport) -> str:
    model = report.model
    size = f"{model.parameters:,} parameters".replace(",", "&#8239;")
    if model.patches is not None:
        size += f", {model.patches} patches"
    if model.width is not None:
        size += f", width {model.width}"
    name, _, arguments = model.name.partition(":")
    if arguments:
        size = f"{_text(arguments.replace(',', ', '))}<br>{size}"
    facts = {
        "Model": f"{_text(name)}<small>{size}</small>",
        "Weights": _text(report.weights),
        "Update": _text(report.update),
        "Batch size": _text(report.batch_size),
        "Images": _text(_names(report.images)),
        "Attack families not run": _text(", ".join(report.families_not_run) or "none"),
    }
    cells = "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts.items())
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in report.notes)
    return f"""<header>
<p class="overline">vitguard audit</p>
<h1>{_text(report.outcome())}</h1>
<p class="scope">{_text(report.headline())}</p>
<dl class="facts">{cells}</dl>
{notes}
</header>"""


def _names(images: Sequence[str]) -> str:
    shown = ", ".join(images[:NAMED])
    more = len(images) - NAMED
    return f"{shown} and {more} more" if more > 0 else shown or "not named"


def _overview(report: AuditReport) -> str:
    measured = [f.patch_psnr.max for f in report.findings if f.patch_psnr and f.patch_psnr.finite]
    scale = max([1.0, *measured])
    groups = "".join(
        '<tbody><tr><th scope="rowgroup" colspan="7">'
        f"<span>{_defense(report, defense)}</span></th></tr>"
        + "".join(_overview_row(report, f, scale) for f in findings)
        + "</tbody>"
        for defense, findings in report.configurations().items()
    )
    return f"""<div class="scroll" tabindex="0" role="region" aria-labelledby="overview">
<table>
<thead><tr><th scope="col">Attack</th><th scope="col">Verdict</th>
<th scope="col" class="number">Matched-patch PSNR, dB</th>
<th scope="col" class="number">Above baseline, dB</th><th scope="col" class="number">PSNR, dB</th>
<th scope="col" class="number">Identified</th><th scope="col" class="number">Seconds</th></tr>
</thead>
{groups}
</table>
</div>
<p class="quiet">The worst image of each finding. The no-information baseline<span class="wide">,
the tick on the bars,</span> is {_decibels(report.baseline.patch_psnr)}&nbsp;dB.</p>"""


def _overview_row(report: AuditReport, f: Finding, scale: float) -> str:
    value = f.patch_psnr.max if f.patch_psnr and f.patch_psnr.finite else None
    meter = "" if value is None else _meter(value, report.baseline.patch_psnr, scale, f.verdict)
    numbers = [
        f"{meter}<span>{_decibels(value)}</span>",
        _decibels(report.gain(f), signed=True),
        _decibels(f.psnr and f.psnr.max),
        NOTHING if f.identified is None else share(f.identified),
        _seconds(f),
    ]
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    return f'<tr><th scope="row">{_text(f.attack)}</th><td>{_badge(f.verdict)}</td>{cells}</tr>'


def _robustness(report: AuditReport) -> str:
    """How each defense changes what an attack on the input does: one row beside the other."""
    attacked = [f for f in report.findings if f.robust_accuracy]
    if not attacked:
        return ""
    bounds = list(dict.fromkeys(e for f in attacked for e in f.robust_accuracy or {}))
    titles, alone = _titles(report.findings), _own_controls(report.findings)

    def cell(f: Finding, bound: Any) -> str:
        def value(finding: Finding | None) -> float | None:
            if finding is None:
                return None
            return (
                finding.clean_accuracy
                if bound is None
                else (finding.robust_accuracy or {}).get(bound)
            )

        mine, plainly = value(f), value(alone.get(id(f)))
        if mine is None:
            return NOTHING
        if not f.defended or plainly is None:
            return share(mine)
        change = f"{100 * (mine - plainly):+.0f}".replace("-", "\u2212")
        return f"{share(mine)} <small>{change}</small>"

    def row(f: Finding) -> str:
        cells = "".join(f'<td class="number">{cell(f, b)}</td>' for b in (None, *bounds))
        return (
            f'<tr><th scope="row">{_text(titles[id(f)])}</th>'
            f"<td>{_defense(report, f.defense)}</td>"
            f"{cells}</tr>"
        )

    heads = "".join(
        f'<th scope="col" class="number">at {_text(epsilon_text(b))}</th>' for b in bounds
    )
    return f"""<h2 id="robustness">Attacks on the input</h2>
<div class="scroll" tabindex="0" role="region" aria-labelledby="robustness">
<table>
<thead><tr><th scope="col">Attack</th><th scope="col">Defense</th>
<th scope="col" class="number">Accuracy, clean</th>{heads}</tr></thead>
<tbody>{"".join(map(row, attacked))}</tbody>
</table>
</div>
<p class="quiet">Small numbers: the change in percentage points beside the undefended model. Each
defense is put on the same weights, in eval mode: one that acts in training only changes nothing
here, and what training under it changes shows in an audit of the weights it gave.</p>"""


def _input_attack(f: Finding) -> str:
    kind = " targeted" if f.settings.get("targeted") else ""
    source = f.settings.get("surrogate")
    return f"{f.attack}{kind}" + (f" from {source}" if source else "")


def _places(findings: Sequence[Finding]) -> list[tuple[str, int]]:
    """Return each finding's attack, and which one of that name it is under its defense, from 0."""
    seen: Counter[tuple[str, str]] = Counter()
    places = []
    for f in findings:
        name = _input_attack(f)
        places.append((name, seen[f.defense, name]))
        seen[f.defense, name] += 1
    return places


def _titles(findings: Sequence[Finding]) -> dict[int, str]:
    """Return each finding's attack by the finding's id, numbered where several share the name."""
    places = _places(findings)
    several = {name for name, place in places if place}
    return {
        id(f): f"{name}, no. {place + 1}" if name in several else name
        for f, (name, place) in zip(findings, places, strict=True)
    }


def _own_controls(findings: Sequence[Finding]) -> dict[int, Finding]:
    """Return the undefended run of the same attack, by the finding's id.

    Two surrogates may be of one class, so the order tells them apart: it is the same under each
    defense.
    """
    placed = list(zip(findings, _places(findings), strict=True))
    alone = {place: f for f, place in placed if not f.defended}
    return {id(f): alone[place] for f, place in placed if place in alone}


def _meter(value: float, floor: float, scale: float, verdict: str) -> str:
    def percent(number: float) -> str:
        inside = min(max(number / scale, 0.0), 1.0) if math.isfinite(number) else 0.0
        return f"{100 * inside:.1f}%"

    hot = " hot" if verdict == "leaks" else ""
    style = f"--value:{percent(value)};--floor:{percent(floor)}"
    return f'<span class="meter{hot}" style="{style}" aria-hidden="true"><i></i><b></b></span>'


def _configuration(report: AuditReport, defense: str, findings: list[Finding], limit: int) -> str:
    cards = "".join(_card(report, f, limit) for f in findings)
    return f'<section><h2 class="defense">{_defense(report, defense)}</h2>{cards}</section>'


def _card(report: AuditReport, f: Finding, limit: int) -> str:
    reasons = "".join(f'<p class="reason">{_text(r)}</p>' for r in remarks(f))
    pictures = f.images
    guessed = pictures is not None and pictures.reconstruction is not None
    shown = rows(f, limit if guessed else 1)
    strips = "".join(_strip(row, with_control=not report.is_control(f)) for row in shown)
    total = pictures.count if pictures is not None else 0
    targeted = bool(f.settings.get("targeted"))
    strips += "".join(_triptych(example, targeted) for example in f.examples)
    if guessed and total > len(shown):
        strips += f'<p class="quiet">{len(shown)} of {total} images, the closest first.</p>'
    return f"""<article class="card">
<div class="title"><h3>{_text(_titles(report.findings)[id(f)])}</h3>{_badge(f.verdict)}</div>
{reasons}
<div class="body">{f"<div>{strips}</div>" if strips else ""}{_metrics(report, f)}</div>
{_details(f)}
</article>"""


def _strip(row: Row, *, with_control: bool) -> str:
    size = next((p.size for p in (row.original, row.control, row.reconstruction) if p), (1, 1))
    ratio = f"--ratio:{size[0]}/{size[1]}"
    figures = [_figure("Original", row.name, row.original, "", ratio, otherwise="not known")]
    if with_control:
        remark = _decibels_of(row.control_psnr, "no defense")
        figures.append(_figure("Control", row.name, row.control, remark, ratio))
    guess = _decibels_of(row.psnr, "")
    figures.append(_figure("Reconstruction", row.name, row.reconstruction, guess, ratio))
    kind = "strip" if with_control else "strip two"
    return f'<div class="{kind}">{"".join(figures)}</div>'


def _triptych(example: Triptych, targeted: bool) -> str:
    figures = "".join(
        _figure(p.title, "input", p.picture, p.remark, "")
        for p in panels(example, targeted=targeted)
    )
    return f'<div class="strip">{figures}</div>'


def _figure(
    title: str,
    name: str,
    picture: Image.Image | None,
    remark: str,
    ratio: str,
    otherwise: str = "nothing",
) -> str:
    if picture is None:
        shown = f'<div class="empty" style="{ratio}">{otherwise}</div>'
    else:
        data = base64.b64encode(encode(picture)).decode()
        small = ' class="small"' if max(picture.size) < 200 else ""
        shown = (
            f'<img{small} width="{picture.width}" height="{picture.height}" '
            f'style="height:auto" alt="{_text(title)} of {_text(name)}" '
            f'src="data:image/png;base64,{data}">'
        )
    parts = [_text(part) for part in (name if title == "Original" else "", remark) if part]
    heading = title.replace("Reconstruction", "Recon&shy;struction")  # breaks there on a phone
    caption = "<br>".join([f"<b>{heading}</b>", *parts])
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _metrics(report: AuditReport, f: Finding) -> str:
    def pair(summary: Summary | None, best: str = "max", form: str = ".1f") -> str:
        if summary is None:
            return ""
        worst, mean = plain(getattr(summary, best)), plain(summary.mean)
        if worst is None or mean is None:
            return "not a number"
        return f"{worst:{form}} <small>mean {mean:{form}}</small>".replace("-", "\u2212")

    gain = _decibels(report.gain(f), signed=True) + " dB" if f.patch_psnr or f.gain else ""
    decoys = f" <small>among {_text(f.decoys)} decoys</small>" if f.decoys is not None else ""
    mask = f.mask and f"{share(f.mask.precision)} <small>recall {share(f.mask.recall)}</small>"
    values = {
        "PSNR, dB": pair(f.psnr),
        "Matched-patch PSNR, dB": pair(f.patch_psnr),
        "Above the baseline": gain,
        "SSIM": pair(f.ssim, form=".3f"),
        "MSE": pair(f.mse, "min", ".1e"),
        "FFT2D": pair(f.fft2d, "min", ".2g"),
        "Identified": share(f.identified) + decoys if f.identified is not None else "",
        "Labels correct": share(f.labels_correct) if f.labels_correct is not None else "",
        "Shuffle mask, precision": mask or "",
        "Control": "" if report.is_control(f) else _control(f),
        "Seconds per batch": "" if f.seconds is None else _seconds(f),
    }
    cells = "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in values.items() if v)
    return f'<dl class="metrics">{cells}</dl>' if cells else ""


def _control(f: Finding) -> str:
    if f.control is None:
        return ""
    psnr = f.control.psnr
    value = "" if psnr is None else f" <small>{_decibels(psnr.max)} dB</small>"
    return _text(f.control.verdict) + value


def _details(f: Finding) -> str:
    parts = ""
    for title, values in (("Attack settings", f.settings), ("What the attack reported", f.details)):
        if values:
            parts += f"<details><summary>{title}</summary>{_pairs(values)}</details>"
    return parts


def _pairs(values: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<dt>{_text(k)}</dt><dd>{_text(v if isinstance(v, str) else json.dumps(v))}</dd>"
        for k, v in plain(values).items()
    )
    return f'<dl class="pairs">{cells}</dl>'


def _guide(report: AuditReport) -> str:
    legend = "".join(
        f"<dt>{_badge(verdict)}</dt><dd>{_text(meaning)}</dd>"
        for verdict, meaning in MEANINGS.items()
    )
    return f"""<section>
<h2>How to read this</h2>
<h3>Verdicts</h3>
<dl class="legend">{legend}</dl>
<h3>Baseline</h3>
<p>{_text(baseline_text(report))} PSNR is the size of the error in dB: 6 dB more halve it.
Matched-patch PSNR lets every patch move to where it fits best, so that moving pieces around does
not count as protection.</p>
<h3>Threat model</h3>
<p>{_text(threat_text(report.threat))}</p>
</section>"""


def _defense(report: AuditReport, spec: str) -> str:
    if spec == "none":
        kind = "tensors withheld" if report.threat.get("withheld") else "the control"
        return f'No defense <span class="quiet">{kind}</span>'
    return f"<code>{_text(spec)}</code>"


def _badge(verdict: str) -> str:
    shape = f'<svg viewBox="0 0 16 16" aria-hidden="true">{SHAPES[verdict]}</svg>'
    return f'<span class="badge {verdict.replace(" ", "-")}">{shape}{_text(verdict)}</span>'


def _decibels(value: float | None, *, signed: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    return decibels(value, signed=signed).replace("-", "\u2212")


def _seconds(f: Finding) -> str:
    if f.seconds is None or not math.isfinite(f.seconds):
        return NOTHING
    return f"{f.seconds:.2f}" if f.seconds >= 0.005 else "&lt;\u200a0.01"


def _decibels_of(value: float | None, otherwise: str) -> str:
    known = value is not None and math.isfinite(value)
    return ", ".join(filter(None, (otherwise, f"{_decibels(value)} dB" if known else "")))


def _text(value: object) -> str:
    return html.escape(clean(value), quote=True)
