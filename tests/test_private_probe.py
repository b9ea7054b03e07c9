"""The recipe for a private head says what is claimed, what was reached and what canaries prove."""

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("opacus")


@pytest.fixture
def probe(monkeypatch, tmp_path):
    """The script, with features of two hundred records that are drawn here."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    script = importlib.import_module("private_probe")
    for name, value in (("HELD", 20), ("BATCH", 45), ("WIDTH", 128), ("EPOCHS", {8.0: 2})):
        monkeypatch.setattr(script, name, value)
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(script.CLASSES, script.WIDTH, generator=generator)
    for split, count in (("public", 20), ("train", 200), ("test", 40)):
        labels = torch.arange(count) % script.CLASSES
        noise = torch.randn(count, script.WIDTH, generator=generator)
        torch.save((means[labels] + 0.3 * noise, labels), tmp_path / f"{split}-000000.pt")
    return script


@pytest.mark.slow
def test_bound_attack_and_canaries_of_a_run_stand_side_by_side(probe, tmp_path):
    row = probe.run(tmp_path, 8.0, 0, 100, probe.RATE, held_out=False)
    assert 0 <= row.proved <= row.claimed <= 8 and 0 < row.composed <= row.claimed
    assert probe.ALARMS < row.shown <= row.bound < 1 and 0 <= row.reached <= 1


def test_what_an_adversary_finds_is_counted_at_its_false_alarms(probe):
    absent = torch.arange(200.0)
    assert probe.found(absent, absent + 1) == pytest.approx(3 / 200)
    assert probe.found(absent, absent + 1000) == 1 and probe.found(absent, absent - 1000) == 0
