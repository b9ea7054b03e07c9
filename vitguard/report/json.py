"""A report as JSON: schema 1, in which a value that does not exist is `null`."""

from __future__ import annotations

import json
from typing import Any

from vitguard.report.finding import plain
from vitguard.report.results import AuditResults

__all__ = ["to_json", "to_json_text"]

SCHEMA = 1


def to_json(report: AuditResults) -> dict[str, Any]:
    """Return the report as plain JSON values."""
    return plain(
        {
            "schema": SCHEMA,
            "vitguard": report.version,
            "model": vars(report.model),
            "images": report.images,
            "batch_size": report.batch_size,
            "seed": report.seed,
            "baseline": vars(report.baseline),
            "findings": [{**f.to_json(), "gain": report.gain(f)} for f in report.findings],
            "outcome": report.outcome(),
            "headline": report.headline(),
            "weights": report.weights,
            "update": report.update,
            "threat": report.threat,
            "families_not_run": report.families_not_run,
            "notes": report.notes,
            "interrupted": report.interrupted,
            "advice": report.advice,
        }
    )


def to_json_text(report: AuditResults) -> str:
    """Return `to_json` as text; pure ASCII."""
    return json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
