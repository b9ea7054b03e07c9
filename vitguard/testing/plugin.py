"""The pytest plugin: fixtures, a marker, two options, a summary. It imports no torch by itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vitguard.testing.noted import BUDGET, drain

__all__: list[str] = []

_KEY = "vitguard"
_ROWS: pytest.StashKey[list[dict[str, str]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("vitguard", "properties of protected models")
    group.addoption(
        "--vitguard-budget", choices=("fast", "full"), default=None,
        help="work of an assertion that is not told how much: fast (default) or full",
    )  # fmt: skip
    group.addoption(
        "--vitguard-report", metavar="FILE", default=None,
        help="write what every assertion found as JSON",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and pass the budget on, to workers and assertions alike."""
    config.addinivalue_line("markers", "vitguard: tests a property of a protected model")
    config.stash[_ROWS] = []
    if chosen := config.getoption("--vitguard-budget"):
        os.environ[BUDGET] = chosen
    if path := config.getoption("--vitguard-report"):  # now: at the end the run would be lost
        from vitguard.errors import InputError
        from vitguard.files import check_writable

        try:
            check_writable(path)
        except InputError as error:
            raise pytest.UsageError(f"--vitguard-report: {error}") from error


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say the budget, where one was chosen."""
    chosen = config.getoption("--vitguard-budget")
    return f"vitguard: {chosen} budget" if chosen else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Give the report what the assertions of the test found; workers send it to the controller."""
    report = yield
    if notes := drain():
        report.user_properties.append((_KEY, json.dumps(notes)))
    return report


class _Collector:
    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.rows = rows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            return  # the properties of the call come again with it
        for key, value in report.user_properties:
            if key == _KEY:
                for note in json.loads(str(value)):  # an example each, where Hypothesis runs it
                    row = {"test": report.nodeid, **note}
                    if row not in self.rows:
                        self.rows.append(row)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Collect what the reports bring."""
    session.config.pluginmanager.register(_Collector(session.config.stash[_ROWS]), "vitguard-rows")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print a table of the properties that were tested, and write the report that was asked for."""
    rows = config.stash[_ROWS]
    if path := config.getoption("--vitguard-report"):
        Path(path).write_text(json.dumps({"schema": 1, "properties": rows}, indent=2) + "\n")
    if not rows:
        return
    terminalreporter.section("vitguard")
    for row in rows:
        test = row["test"].rpartition("::")[2]
        terminalreporter.write_line(f"{row['outcome']:<12} {row['property']:<30} {test}")
    outcomes = ("holds", "fails", "inconclusive", "error")
    count = {o: sum(r["outcome"] == o for r in rows) for o in outcomes}
    told = [f"{n} {o}" for o, n in count.items() if n or o != "error"]
    terminalreporter.write_line(", ".join(told))


@pytest.fixture(scope="session")
def vit() -> Any:
    """A ViT of two blocks and 16 tokens for images of 16 x 16 pixels, ten classes."""
    import timm
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=96, depth=2,
            num_heads=4, num_classes=10,
        )  # fmt: skip


@pytest.fixture(scope="session")
def photos() -> Any:
    """Five photos, pixels in [0, 1], shape (5, 3, 16, 16)."""
    from vitguard import data

    return data.sample_images((16, 16), count=5).pixels


@pytest.fixture
def guarded(vit: Any) -> Any:
    """`guarded(defenses)`: the guard of a fresh copy of `vit`."""
    import copy

    from vitguard.guard import protect

    return lambda defenses, **how: protect(copy.deepcopy(vit).train(), defenses, **how)
