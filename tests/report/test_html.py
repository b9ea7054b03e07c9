"""The page's table of attacks on the input: each row beside its own control."""

from __future__ import annotations

import re

from vitguard.report import AuditReport, Baseline, Finding, ModelFacts
from vitguard.report.html import to_html


def attacked(defense: str, clean: float, robust: float | None, **settings) -> Finding:
    """An attack on the input; one that failed has no accuracy."""
    return Finding(
        defense,
        "fgsm",
        "inconclusive",
        settings={"surrogate": None, "targeted": False, **settings},
        clean_accuracy=None if robust is None else clean,
        robust_accuracy=None if robust is None else {0.1: robust},
    )


def table_of(*findings: Finding) -> list[list[str]]:
    """Return the rows of the table as text."""
    report = AuditReport(
        findings=findings,
        model=ModelFacts("vit", 1),
        images=("a",),
        batch_size=1,
        baseline=Baseline(10.0, 11.0),
        weights="random",
        update="one gradient",
        families_not_run=(),
    )
    page = to_html(report)
    page = page[page.index('id="robustness"') :]
    body = re.findall("<tbody>(.+?)</tbody>", page, re.S)[0]
    rows = re.findall("<tr>(.+?)</tr>", body, re.S)
    cells = [re.findall("<t[hd][^>]*>(.+?)</t[hd]>", row, re.S) for row in rows]
    return [[re.sub("<[^>]+>", "", cell).strip() for cell in row] for row in cells]


def test_two_surrogates_of_one_class_are_numbered_and_have_controls_of_their_own():
    rows = table_of(
        attacked("none", 0.9, 0.8, surrogate="ViT"),
        attacked("shuffle", 0.9, 0.7, surrogate="ViT"),
        attacked("none", 0.9, 0.4, surrogate="ViT"),
        attacked("shuffle", 0.9, 0.5, surrogate="ViT"),
        attacked("none", 0.9, 0.1),
        attacked("shuffle", 0.9, 0.0),
    )
    first, second = "fgsm from ViT, no. 1", "fgsm from ViT, no. 2"
    assert [row[0] for row in rows] == [first, first, second, second, "fgsm", "fgsm"]
    shown = [row[-1] for row in rows]
    assert shown == ["80 %", "70 % \u221210", "40 %", "50 % +10", "10 %", "0 % \u221210"]


def test_a_control_that_failed_is_no_other_attacks_control():
    rows = table_of(
        attacked("none", 0.9, None),
        attacked("noise", 0.9, 0.7),
        attacked("none", 0.9, 0.4),
        attacked("noise", 0.9, 0.5),
    )
    assert [row[0] for row in rows] == ["fgsm, no. 1", "fgsm, no. 2", "fgsm, no. 2"]
    assert [row[-1] for row in rows] == ["70 %", "40 %", "50 % +10"]


def test_a_defense_without_a_control_shows_no_change():
    assert table_of(attacked("noise", 0.9, 0.5)) == [["fgsm", "noise", "90 %", "50 %"]]
