"""The table of what updates of a part give away: it goes on where it stopped and hides no cell."""

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("peft_table")


def line(key, attack="ladder"):
    made = {"verdict": "leaks", "matched": 30.0, "gain": 9.0, "labels": 1.0, "rung": "span"}
    floor = {"patch_psnr": 15.0, "thumbnail": 18.0}
    return {"key": key, "attack": attack, **made, "verified": 0.5, "floor": floor}


def test_every_cell_stands_in_the_table_and_one_that_was_not_run_says_why(script, monkeypatch):
    monkeypatch.setattr(script, "planned", lambda model, trained: "labels")
    cells = list(script.grid())
    text = script.table([line(cells[0].key)])
    assert "| **leaks** 30.0 (+9.0) `span`, 50% proved; labels 100% |" in text
    assert len(cells) == 48 and text.count("not run, for lack of time") == 95


def test_matching_of_fewer_iterations_says_how_many(script):
    found = {**line("a", "inverting"), "rung": None, "verified": None}
    assert script.shown({**found, "iterations": 200}).endswith("labels 100%")
    assert script.shown({**found, "iterations": 15}).endswith("; 15 iterations")


def test_an_attack_that_was_not_tried_is_no_attack_that_failed(script):
    untried = {**line("a"), "verdict": "inconclusive", "matched": None, "labels": None}
    untried["reason"] = "no rung gave an image (containment: untried on a batch)"
    assert script.shown(untried) == "`containment` untried"


def test_a_run_that_was_cut_off_goes_on_with_the_cell_it_was_at(script, monkeypatch, tmp_path):
    file, ran = tmp_path / "rows.jsonl", []
    keys = [cell.key for cell in script.grid() if cell.key.startswith("cifar a, crop")]
    file.write_text(json.dumps(line(keys[0])) + "\n" + json.dumps(line(keys[1]))[:40])

    def measured(cell, attack):
        ran.append(cell.key)
        return {**line(cell.key), "reason": "", "seconds": 1.0}

    monkeypatch.setattr(script, "measured", measured)
    monkeypatch.setattr(sys, "argv", ["peft_table.py", "--out", str(file), "--only", "crop"])
    script.main()
    assert ran == keys[1:]
    assert [json.loads(text)["key"] for text in file.read_text().splitlines()] == keys


def test_a_row_holds_the_iterations_that_were_made_and_not_those_that_were_asked_for(script):
    (attack,) = script.attacks(1.0, None, matching=True)[1:]
    assert attack.budget is not None  # so fewer may be made
    (attack,) = script.attacks(1.0, 7, matching=True)[1:]
    assert (attack.budget, attack.iterations) == (None, 7)
