"""What fails behind a finished audit takes neither its report nor its gate."""

import json
from pathlib import Path

import pytest

import vitguard.advise
from vitguard.cli import main
from vitguard.errors import InputError
from vitguard.report.audit_report import AuditReport

SMALL = (
    "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=96,depth=2,num_heads=3,num_classes=10"
)
AUDIT = ("audit", "--model", SMALL, "--num-images", "1", "--attack", "position")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def raising(error):
    def raises(*_, **__):
        raise error

    return raises


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [InputError("Expected a model, got none."), KeyError("x"), KeyboardInterrupt()]
)
def test_an_advice_that_fails_is_a_note_of_the_report(monkeypatch, error):
    monkeypatch.setattr(vitguard.advise, "advise_report", raising(error))
    gate = ("--defense", "positions:kind=frozen", "--max-gain", "6")
    assert main([*AUDIT, *gate, "--json", "out.json", "--html", "out.html"]) == 3
    found = json.loads(Path("out.json").read_text())
    assert found["findings"][0]["verdict"] == "leaks" and found["advice"] == ""
    assert "no advice" in found["notes"][-1] and type(error).__name__ in found["notes"][-1]
    assert "no advice" in Path("out.html").read_text()


@pytest.mark.slow
def test_an_interrupt_between_two_reports_says_what_was_written(monkeypatch, capsys):
    monkeypatch.setattr(AuditReport, "save", raising(KeyboardInterrupt()))
    assert main([*AUDIT, "--json", "out.json", "--html", "out.html"]) == 130
    assert json.loads(Path("out.json").read_text())["findings"] and not Path("out.html").exists()
    assert "nothing was written" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_report_that_cannot_be_written_takes_no_other(monkeypatch, capsys):
    monkeypatch.setattr(AuditReport, "save", raising(OSError(28, "No space left on device")))
    assert main([*AUDIT, "--json", "out.json", "--html", "out.html"]) == 2
    assert json.loads(Path("out.json").read_text())["findings"]
    said = capsys.readouterr()
    assert "No space left" in said.err and "Traceback" not in said.err
    assert "the undefended control" in said.out
