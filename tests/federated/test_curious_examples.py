"""A curious server in the examples: without vitguard it rebuilds photos, with it nothing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SPEC = "positions+shuffle:ratio=0.5+encryption"


@pytest.mark.slow
def test_a_curious_flower_server_reads_photos_without_vitguard_and_nothing_with_it(
    tmp_path, monkeypatch
):
    pytest.importorskip("flwr", reason="needs vitguard[flower]")
    app = EXAMPLES / "flower_cifar10"
    monkeypatch.syspath_prepend(str(app))
    spec = importlib.util.spec_from_file_location("curious_server", app / "curious_server.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    report = example.main(str(tmp_path))
    for name in [n for n in sys.modules if n.startswith("flower_cifar10")]:
        sys.modules.pop(name)
    seen = [f for f in report.findings if f.defended and f.attack == "position"]
    assert [f.defense for f in seen] == ["plain"] * 3 + [SPEC] * 3
    for finding in seen[:3]:
        assert finding.verdict == "leaks" and finding.psnr.max > 60
    for finding in seen[3:]:
        assert finding.verdict == "blocked" and finding.control.verdict == "leaks"
    assert {f.verdict for f in report.findings if f.defense == SPEC} == {"blocked"}
    assert (tmp_path / "curious-server.html").stat().st_size > 10_000
    # what was kept of the defended round is ciphertext alone
    for path in (tmp_path / "sealed").glob("round-1/update-*"):
        from vitguard.core import Update

        update = Update.load(path)
        assert not any(t.any() for t in update.tensors.values()) and update.payloads


@pytest.mark.slow
def test_a_curious_nvflare_server_reads_photos_without_vitguard_and_nothing_with_it(tmp_path):
    pytest.importorskip("nvflare", reason="needs the extra nvflare", exc_type=ImportError)
    done = subprocess.run(
        [
            sys.executable,
            str(EXAMPLES / "nvflare_cifar10" / "curious_server.py"),
            "--out",
            str(tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "run" / "curious-server.json").read_text())
    seen = [f for f in report["findings"] if f["defense"] != "none" and f["attack"] == "position"]
    assert [f["verdict"] for f in seen] == ["leaks"] * 3 + ["blocked"] * 3
    assert min(f["psnr"]["max"] for f in seen[:3]) > 60
    assert {f["control"]["verdict"] for f in seen} == {"leaks"}
