"""A report as one picture: a grid of originals, controls and reconstructions."""

from __future__ import annotations

from PIL import Image

from vitguard.errors import expected
from vitguard.report import pictures
from vitguard.report.results import AuditResults
from vitguard.report.words import clean, decibels

__all__ = ["to_png", "to_png_bytes"]


def to_png(report: AuditResults) -> Image.Image:
    """Return one grid of every finding that reconstructed something."""
    labelled = []
    for finding in report.findings:
        if finding.images is None or finding.images.reconstruction is None:
            continue
        for row in pictures.rows(finding, limit=2):
            value = f", {decibels(row.psnr)} dB" if row.psnr is not None else ""
            label = f"{finding.defense}, {finding.attack}: {finding.verdict}, {row.name}{value}"
            labelled.append((clean(label), row))
    if not labelled:
        raise expected("a report with reconstructed pictures", "none", "Save it as .html or .json.")
    heading = [clean(f"{report.model.name}: {report.outcome()}"), clean(report.headline())]
    return pictures.grid(labelled, heading)


def to_png_bytes(report: AuditResults) -> bytes:
    """Return `to_png` as a file."""
    return pictures.encode(to_png(report))
