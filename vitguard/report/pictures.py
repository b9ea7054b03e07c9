"""Pictures of a finding, worst first, as PIL images, PNG bytes and one grid."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitguard.attacks.base import Triptych
from vitguard.report.finding import Finding

__all__ = ["Panel", "Row", "encode", "epsilon_text", "grid", "panels", "rows"]

SIDE = 224
"""Pixels that a picture measures in the grid."""

LARGEST = 320
"""Pixels above which a picture is shrunk to be shown; metrics come from the full one."""


@dataclass(frozen=True)
class Row:
    """One image of a finding: the original and what came out; PSNR in dB where it is known."""

    name: str
    original: Image.Image | None
    control: Image.Image | None
    reconstruction: Image.Image | None
    control_psnr: float | None
    psnr: float | None


def rows(finding: Finding, limit: int) -> list[Row]:
    """Return the pictures of a finding, those that leak most first, `limit` at most."""
    pictures = finding.images
    if pictures is None:
        return []
    count = pictures.count
    each = _per_image(finding.psnr, count)
    order = sorted(range(count), key=lambda i: -(each[i] or 0.0))
    control = _per_image(finding.control.psnr if finding.control else None, count)
    return [
        Row(
            name=pictures.names[i] if i < len(pictures.names) else f"image {i + 1}",
            original=_at(pictures.original, i),
            control=_at(pictures.control, i),
            reconstruction=_at(pictures.reconstruction, i),
            control_psnr=control[i],
            psnr=each[i],
        )
        for i in order[:limit]
    ]


@dataclass(frozen=True)
class Panel:
    """One picture of an attack on an input, and what is said of it."""

    title: str
    remark: str
    picture: Image.Image


def panels(example: Triptych, *, targeted: bool = False) -> tuple[Panel, Panel, Panel]:
    """Return the image, what was added times a gain, and the adversarial image."""

    def said(answer: tuple[int, float]) -> str:
        return f"class {answer[0]}, {100 * answer[1]:.1f} %"

    aim = f"aimed at class {example.label}" if targeted else f"true class {example.label}"
    bound = f"at most {epsilon_text(example.epsilon)} a pixel"
    return (
        Panel("Image", f"{said(example.before)}; {aim}", _picture(example.image)),
        Panel(f"Perturbation \u00d7 {example.gain:.3g}", bound, _picture(example.magnified)),
        Panel("Adversarial", said(example.after), _picture(example.adversarial)),
    )


def epsilon_text(epsilon: object) -> str:
    """Write a bound on pixels in [0, 1] as people do: 8/255."""
    if not isinstance(epsilon, float):
        return str(epsilon)
    steps = 255 * epsilon
    return f"{round(steps)}/255" if abs(steps - round(steps)) < 1e-3 else f"{epsilon:.4g}"


def encode(image: Image.Image) -> bytes:
    """Return the PNG file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def grid(labelled: Sequence[tuple[str, Row]], heading: Sequence[str]) -> Image.Image:
    """Draw one line of pictures per row, its label above it and `heading` above all."""
    gap, line = 12, 20
    font = ImageFont.load_default(14)
    lines = [part for text in heading for part in textwrap.wrap(text, width=92)]
    top = gap + line * len(lines) + gap
    step = line + SIDE + gap
    sheet = Image.new("RGB", (4 * gap + 3 * SIDE, top + line + step * len(labelled)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(lines):
        draw.text((gap, gap + i * line), text, "black", font)
    for column, title in enumerate(("original", "control: no defense", "reconstruction")):
        draw.text((gap + column * (SIDE + gap), top), title, "#555", font)
    for i, (label, row) in enumerate(labelled):
        y = top + line + i * step
        draw.text((gap, y), _fit(draw, label, font, sheet.width - 2 * gap), "black", font)
        for column, picture in enumerate((row.original, row.control, row.reconstruction)):
            x = gap + column * (SIDE + gap)
            if picture is None:
                draw.rectangle((x, y + line, x + SIDE - 1, y + line + SIDE - 1), outline="#bbb")
                draw.text((x + gap, y + line + gap), "none", "#777", font)
            else:
                sheet.paste(picture.resize((SIDE, SIDE), _filter(picture)), (x, y + line))
    return sheet


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """Cut `text` where it would run off the sheet."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def _filter(picture: Image.Image) -> Image.Resampling:
    # A small picture keeps its pixels: smoothing would show detail that nobody reconstructed.
    small = max(picture.size) < SIDE
    return Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS


def _picture(image: Tensor) -> Image.Image:
    pixels = image.detach().to("cpu").float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
    pixels = pixels.expand(3, -1, -1).permute(1, 2, 0).mul(255).round().byte()
    picture = Image.fromarray(pixels.numpy())
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return picture


def _at(images: Tensor | None, index: int) -> Image.Image | None:
    return None if images is None or index >= len(images) else _picture(images[index])


def _per_image(summary: object, count: int) -> list[float | None]:
    values = getattr(summary, "per_image", ())
    return list(values[:count]) if len(values) >= count else [None] * count
