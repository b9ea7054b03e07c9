"""Attacks on the input in a report: what each one is called, and which run is its control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vitguard.report.finding import Finding

__all__ = ["own_controls", "titles"]


def titles(findings: Sequence[Finding]) -> dict[int, str]:
    """Return each finding's attack by the finding's id, numbered where several share the name."""
    places = _places(findings)
    several = {name for name, place in places if place}
    return {
        id(f): f"{name}, no. {place + 1}" if name in several else name
        for f, (name, place) in zip(findings, places, strict=True)
    }


def own_controls(findings: Sequence[Finding]) -> dict[int, Finding]:
    """Return the undefended run of the same attack, by the finding's id.

    Two surrogates may be of one class, so the order tells them apart: it is the same under each
    defense.
    """
    placed = list(zip(findings, _places(findings), strict=True))
    alone = {place: f for f, place in placed if not f.defended}
    return {id(f): alone[place] for f, place in placed if place in alone}


def _places(findings: Sequence[Finding]) -> list[tuple[str, int]]:
    """Return each finding's attack, and which one of that name it is under its defense, from 0."""
    seen: Counter[tuple[str, str]] = Counter()
    places = []
    for f in findings:
        name = _name(f)
        places.append((name, seen[f.configuration, name]))
        seen[f.configuration, name] += 1
    return places


def _name(f: Finding) -> str:
    kind = " targeted" if f.settings.get("targeted") else ""
    source = f.settings.get("surrogate")
    return f"{f.attack}{kind}" + (f" from {source}" if source else "")
