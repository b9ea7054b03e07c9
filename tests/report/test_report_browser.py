"""The HTML report in a real browser: Debian's chromium, headless and offline."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitguard.report import (
    AuditReport,
    Baseline,
    Control,
    Finding,
    Mask,
    ModelFacts,
    Pictures,
    Summary,
)

from .test_report_escape import EVIL, Filled

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed"),
]

# Colours that no style sheet holds, so that finding them proves that the pictures were drawn.
COLOURS = {"original": (255, 0, 200), "control": (0, 250, 10), "reconstruction": (20, 0, 255)}


def solid(colour: tuple[int, int, int]) -> torch.Tensor:
    return (torch.tensor(colour) / 255)[None, :, None, None].expand(1, 3, 16, 16)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    level = Summary.of([65.2])
    pictures = Pictures(**{name: solid(c) for name, c in COLOURS.items()}, names=("a" * 120,))
    defense = "positions:kind=sincos+" + "shuffle:ratio=0.7,each=image+" * 6 + "noise:scale=0.01"
    finding = Finding(
        defense=defense,
        attack="span",
        verdict="leaks",
        reason="averylongwordthatnobodywouldbreak" * 8,
        settings={"parameters": "x" * 200, "iterations": 10_000_000},
        details={"residuals": [1e-7] * 40},
        psnr=level,
        patch_psnr=level,
        ssim=level,
        mse=level,
        identified=1.0,
        decoys=100,
        mask=Mask(1.0, 0.9),
        control=Control("leaks", level),
        seconds=0.5,
        images=pictures,
    )
    report = AuditReport(
        model=ModelFacts("vit_tiny_patch16_224:" + "img_size=32,patch_size=4," * 6, 5, 64, 192),
        images=("b" * 150,),
        batch_size=1,
        baseline=Baseline(10.0, 12.0),
        findings=(finding,),
        weights="checkpoint " + "folder/" * 30,
        update="one gradient",
        threat={"withheld": ["y" * 150]},
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.save(path)
    return path


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose every text tries to run a script."""
    path = tmp_path_factory.mktemp("evil") / "report.html"
    Filled(EVIL).report().save(path)
    return path


def chromium(folder: Path, target: Path, *options: str) -> str:
    """Run chromium on a file with its own profile and no network, and return what it prints."""
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
        f"--user-data-dir={folder / 'profile'}",
        *options,
        target.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def in_frame(page: Path, folder: Path, width: int, scheme: str = "light") -> Path:
    """Wrap the untouched report in a frame of `width` pixels that a script outside measures."""
    frame = html.escape(page.read_text("utf-8"), quote=True)
    measure = """
      const inside = document.querySelector('iframe').contentDocument;
      const root = inside.documentElement;
      const images = [...inside.images];
      document.querySelector('pre').textContent = JSON.stringify({
        viewport: root.clientWidth, content: root.scrollWidth,
        decoded: images.map(i => i.complete && i.naturalWidth), alt: images.map(i => i.alt),
        shown: images.map(i => Math.round(i.getBoundingClientRect().width)),
        table: [...inside.querySelectorAll('.scroll')].map(e => getComputedStyle(e).overflowX),
        loads: performance.getEntriesByType('resource').map(e => e.name),
        background: getComputedStyle(inside.body).backgroundColor,
        running: inside.scripts.length + inside.querySelectorAll('a, iframe, form, link').length,
        handlers: [...inside.querySelectorAll('*')].flatMap(
          e => e.getAttributeNames()).filter(name => name.startsWith('on')),
        wide: [...inside.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth),
        rendering: images.map(i => getComputedStyle(i).imageRendering),
      });"""
    wrapper = folder / f"frame-{width}-{scheme}.html"
    wrapper.write_text(
        f'<!doctype html><body style="margin:0"><iframe style="border:0;color-scheme:{scheme}" '
        f'width="{width}" height="4000" srcdoc="{frame}"></iframe><pre></pre>'
        f"<script>onload = () => {{ {measure} }}</script>",
        "utf-8",
    )
    return wrapper


def measured(page: Path, folder: Path, width: int, scheme: str = "light") -> dict:
    dom = chromium(folder, in_frame(page, folder, width, scheme), "--dump-dom")
    found = re.search(r"<pre>(\{.*\})</pre>", dom, re.S)
    assert found, "the measuring script did not run"
    return json.loads(html.unescape(found.group(1)))


@pytest.mark.parametrize("width", [360, 1200])
def test_no_horizontal_overflow_and_every_picture_decodes(
    page: Path, tmp_path: Path, width: int
) -> None:
    seen = measured(page, tmp_path, width)
    assert seen["viewport"] == width
    assert seen["content"] <= width
    assert seen["decoded"] == [16, 16, 16]
    assert [a.split(" of ")[0] for a in seen["alt"]] == ["Original", "Control", "Reconstruction"]
    assert min(seen["shown"]) > 60
    assert seen["rendering"] == ["pixelated"] * 3
    assert seen["table"] == ["auto"]
    assert [name for name in seen["loads"] if not name.startswith(("data:", "about:"))] == []


def test_a_browser_finds_no_script_in_a_page_whose_every_text_holds_one(
    evil: Path, tmp_path: Path
) -> None:
    seen = measured(evil, tmp_path, 390)
    assert seen["running"] == 0
    assert seen["handlers"] == []
    assert seen["content"] <= 390
    assert "alert(1)" in evil.read_text("utf-8")


def test_attacks_on_the_input_show_their_numbers_on_a_phone(tmp_path: Path) -> None:
    specs = ("none", "positions:kind=sincos+shuffle:ratio=0.7", "noise:scale=0.01")
    attacked = {"clean_accuracy": 0.98, "robust_accuracy": {8 / 255: 0.5}}
    report = AuditReport(
        model=ModelFacts("vit", 5),
        images=("a",),
        batch_size=1,
        baseline=Baseline(10.0, 12.0),
        findings=tuple(Finding(spec, "fgsm", "inconclusive", **attacked) for spec in specs),
        weights="random",
        update="one gradient",
    )
    report.save(tmp_path / "report.html")
    _, robustness = measured(tmp_path / "report.html", tmp_path, 390)["wide"]
    assert robustness == 0


def test_dark_scheme_is_followed(page: Path, tmp_path: Path) -> None:
    def brightness(scheme: str) -> int:
        colour = measured(page, tmp_path, 800, scheme)["background"]
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert brightness("light") > 700
    assert brightness("dark") < 150


@pytest.mark.parametrize("width", [600, 1200])
def test_screenshot_holds_the_colours_of_the_pictures(
    page: Path, tmp_path: Path, width: int
) -> None:
    shot = tmp_path / "shot.png"
    chromium(tmp_path, page, f"--screenshot={shot}", f"--window-size={width},3000")
    counts = {c: n for n, c in Image.open(shot).convert("RGB").getcolors(10**7) or []}
    for name, colour in COLOURS.items():
        assert counts.get(colour, 0) > 1000, name


def test_page_names_no_external_address(page: Path) -> None:
    assert not re.search(r"https?:|src=\"(?!data:)|href=|url\(|@import", page.read_text("utf-8"))
