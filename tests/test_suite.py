"""The suite itself: one thread a process whoever starts it, and the README's command in CI."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fast import crossed

ROOT = Path(__file__).parent.parent
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ASK = "import torch; print(torch.get_num_threads())"


def bare(**exported):
    """The environment of a newcomer, who has exported nothing else."""
    kept = {k: v for k, v in os.environ.items() if k not in THREADS and "PYTEST" not in k}
    return {**kept, **exported}


def test_this_process_and_those_it_starts_have_the_threads_that_were_set():
    told = int(os.environ["OMP_NUM_THREADS"])
    assert torch.get_num_threads() == told
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) == told


@pytest.mark.slow  # imports torch in a process of its own
def test_the_processes_that_this_one_starts_have_its_threads_in_torch():
    told = int(os.environ["OMP_NUM_THREADS"])
    child = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert int(child.stdout) == min(told, os.cpu_count() or told)


@pytest.mark.slow
def test_with_nothing_exported_workers_of_xdist_have_one_thread():
    pytest.importorskip("xdist")
    this = f"{Path(__file__).relative_to(ROOT)}::{_asked_by_the_test_above.__name__}"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider",
         "-o", "python_functions=_asked*", this],
        cwd=ROOT, env=bare(EXPECTED_THREADS="1"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout[-2000:] + run.stderr


def _asked_by_the_test_above():
    assert torch.get_num_threads() == int(os.environ["EXPECTED_THREADS"])
    child = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert int(child.stdout) == int(os.environ["EXPECTED_THREADS"])


@pytest.mark.parametrize(("exported", "threads"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)])
@pytest.mark.slow
def test_threads_are_set_before_torch_and_a_value_of_your_own_wins(exported, threads):
    code = (
        "import tests.conftest as c, torch\n"
        "print(torch.get_num_threads(), *(c.os.environ[n] for n in c.os.environ if 'NUM_TH' in n))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=bare(**exported), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert {int(word) for word in run.stdout.split()} == {threads}


def test_every_value_of_crossed_axes_is_fast_and_every_combination_is_there():
    axes = "abc", range(7), (True, False)
    cases = crossed(*axes, rounds=2)
    assert len({case.values for case in cases}) == len(cases) == 42
    fast = [case.values for case in cases if not case.marks]
    assert len(fast) == 14
    for place, axis in enumerate(axes):
        assert all(sum(case[place] == value for case in fast) >= 2 for value in axis)
    assert len({(letter, flag) for letter, _, flag in fast}) == 6  # short axes meet whole


def test_ci_takes_the_test_command_out_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = [line.split("'")[1] for line in script.splitlines() if "README.md)" in line]
    start, _, end = pattern.removeprefix("^").partition(".*")
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith(start) and end in line] == [
        'python3 -m venv .venv && .venv/bin/pip install ".[all]" pytest-xdist '
        "&& .venv/bin/python -m pytest -n 2"
    ]
    before = script[: script.index("command=")]
    assert "export OMP" not in script and "pip install" not in before
