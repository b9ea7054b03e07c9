"""The plugin in a project of its own: what it prints and writes, and what it costs who does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TESTS = """
import pytest
from vitguard.testing import assert_removable, assert_not_reconstructable, assert_round_trip
from vitguard.core import Update

pytestmark = pytest.mark.vitguard

def test_green(vit):
    assert_removable(vit, defenses="shuffle")

def test_red(vit, photos):
    assert_not_reconstructable(
        vit, photos[:1], defenses="noise:scale=1e-7", attacks="position"
    )

def test_unknown():
    assert_round_trip(Update({}))

def test_guarded(guarded, photos):
    import os, torch
    assert guarded("positions:kind=frozen").update(photos[:1], torch.tensor([1])).tensors
    assert os.environ["VITGUARD_BUDGET"] == "full"
"""

SMALL = """
import pytest
from vitguard.testing.noted import budget, noted

pytestmark = pytest.mark.vitguard

class Inconclusive(Exception):
    pass

@noted
def assert_it(error=None):
    if error is not None:
        raise error

def test_green():
    assert budget() == "full"
    assert_it()

def test_red():
    assert_it(AssertionError("it leaks"))

def test_unknown():
    assert_it(Inconclusive("nobody knows"))

def test_broken():
    assert_it(TypeError("no tensor"))
"""


def pytest_in(folder, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--strict-markers", "-p", "vitguard.testing.plugin",
         "-p", "no:cacheprovider", *arguments],
        cwd=folder, env=env, capture_output=True, text=True,
    )  # fmt: skip


def test_a_run_counts_what_held_failed_and_was_inconclusive_and_writes_it_down(tmp_path):
    (tmp_path / "test_it.py").write_text(SMALL)
    done = pytest_in(tmp_path, "--vitguard-budget=full", "--vitguard-report=found.json")
    assert "3 failed, 1 passed" in done.stdout, done.stdout
    assert "1 holds, 1 fails, 1 inconclusive, 1 error" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())["properties"]
    assert [(r["outcome"], r["message"]) for r in found] == [
        ("holds", ""), ("fails", "it leaks"), ("inconclusive", "nobody knows"),
        ("error", "no tensor"),
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["missing/found.json", "."])
def test_a_report_that_cannot_be_written_is_told_before_the_first_test(tmp_path, path):
    (tmp_path / "test_it.py").write_text("def test_nothing():\n    pass\n")
    done = pytest_in(tmp_path, f"--vitguard-report={path}")
    assert done.returncode == 4 and "passed" not in done.stdout
    assert "ERROR: --vitguard-report: Expected" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_project_sees_green_red_and_inconclusive_with_a_picture_and_a_report(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    done = pytest_in(tmp_path, "--vitguard-budget=full", "--vitguard-report=found.json")
    assert done.returncode == 1, done.stdout
    assert "2 failed, 2 passed" in done.stdout, done.stdout
    assert "vitguard: full budget" in done.stdout
    assert "1 holds, 1 fails, 1 inconclusive" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {r["test"].rpartition("::")[2]: r for r in found["properties"]}
    assert {k: r["outcome"] for k, r in rows.items()} == {
        "test_green": "holds", "test_red": "fails", "test_unknown": "inconclusive",
    }  # fmt: skip
    picture = tmp_path / rows["test_red"]["message"].rpartition("Picture: ")[2]
    assert picture.is_file() and picture.parent.name == "vitguard-failures"


def test_a_run_that_does_not_use_it_imports_no_torch_and_few_modules(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import sys\n\n\ndef test_nothing():\n"
        "    ours = sorted(m for m in sys.modules if m.split('.')[0] == 'vitguard')\n"
        "    assert ours == ['vitguard', 'vitguard.testing', 'vitguard.testing.noted',\n"
        "                    'vitguard.testing.plugin']\n"
        "    assert not {'torch', 'numpy', 'timm', 'hypothesis'} & set(sys.modules)\n"
    )
    done = pytest_in(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "vitguard: " not in done.stdout and "holds" not in done.stdout  # no header, no table
