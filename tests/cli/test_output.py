"""What becomes of an audit where its output cannot be shown: reports and exit code stay."""

import io
import os
import sys
from pathlib import Path

import pytest

from vitguard.cli.main import main

MODEL = "vit_tiny_patch16_224:img_size=32,patch_size=8,depth=2,embed_dim=96,num_heads=3"
AUDIT = ["audit", "--model", MODEL, "--attack", "span", "--num-images", "1"]


class _Reader(io.TextIOWrapper):
    """Standard output whose other end fails as the system would."""

    def __init__(self, error: type[OSError], *told: object) -> None:
        super().__init__(io.BytesIO(), "utf-8")
        self._error, self._told = error, told

    def write(self, text: str) -> int:
        raise self._error(*self._told)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "defense", "code"),
    [(["--max-gain", "6"], "positions:kind=frozen", 1), (["--max-gain", "6"], "none", 3),
     ([], "none", 0)],
)  # fmt: skip
def test_a_reader_that_leaves_changes_neither_reports_nor_the_gate(
    limit, defense, code, monkeypatch
):
    monkeypatch.setattr(sys, "stdout", _Reader(BrokenPipeError, 32, "Broken pipe"))
    asked = [*AUDIT, "--defense", defense, "--html", "r.html", "--json", "r.json", *limit]
    assert main(asked) == code
    assert Path("r.html").is_file()
    assert Path("r.json").is_file()


@pytest.mark.slow
def test_a_reader_of_errors_that_leaves_passes_no_gate(monkeypatch):
    from rich.console import Console

    leaves = 1 if hasattr(Console, "on_broken_pipe") else 2  # older ones raise: no gate passes
    gone = _Reader(BrokenPipeError, 32, "Broken pipe")
    monkeypatch.setattr(sys, "stderr", gone)
    monkeypatch.setattr(sys, "stdout", gone)
    assert main([*AUDIT, "--defense", "positions:kind=frozen", "--max-gain", "6"]) == leaves


@pytest.mark.slow
def test_json_to_a_reader_that_leaves_still_gates(monkeypatch):
    monkeypatch.setattr(sys, "stdout", _Reader(BrokenPipeError, 32, "Broken pipe"))
    gate = ["--defense", "positions:kind=frozen", "--max-gain", "6"]
    assert main([*AUDIT, *gate, "--json", "-", "--html", "r.html"]) == 1
    assert Path("r.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("json", ["r.json", "-"])
def test_a_full_disk_behind_standard_output_is_one_line(json, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", _Reader(OSError, 28, "No space left on device"))
    assert main([*AUDIT, "--defense", "none", "--html", "r.html", "--json", json]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("vitguard: error: ")
    assert "No space left on device" in said
    assert Path("r.html").is_file()


def test_a_listing_into_a_full_disk_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", _Reader(OSError, 28, "No space left on device"))
    assert main(["list"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_what_is_still_buffered_is_told_off_too(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["plan", "--model", MODEL, "--encrypt", "all", "--json", "-"]) == 2
        assert "No space left on device" in capsys.readouterr().err
        monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_terminal_without_letters_shows_a_name_as_it_can(errors, monkeypatch, tmp_path):
    from PIL import Image

    folder = tmp_path / "fotos-\u00e9-\u65e5"
    folder.mkdir()
    Image.radial_gradient("L").resize((40, 40)).save(folder / "x.png")
    (folder / "notes.txt").touch()
    shown = io.TextIOWrapper(io.BytesIO(), "ascii", errors)
    monkeypatch.setattr(sys, "stdout", shown)
    assert (
        main([*AUDIT, "--defense", "none", "--images", str(folder), "--html", "\u00e9.html"]) == 0
    )
    shown.flush()
    assert b"fotos-" in shown.buffer.getvalue()  # type: ignore[attr-defined]
    assert Path("\u00e9.html").is_file()
