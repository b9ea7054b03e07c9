"""The example runs under NVFlare's simulator."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="needs the extra nvflare", exc_type=ImportError)

JOB = Path(__file__).parents[2] / "examples" / "nvflare_cifar10" / "job.py"


@pytest.mark.slow
def test_the_simulator_runs_two_encrypted_rounds_within_the_bound_of_the_plain_average(tmp_path):
    done = subprocess.run(
        [sys.executable, str(JOB), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "largest error of the average" in done.stdout
    assert list((tmp_path / "run").glob("workspace/**/vitguard/sum-1.bin"))
