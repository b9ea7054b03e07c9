"""What all tests of Flower need: its messages ask which task they are made in."""

import logging
import sys

import pytest


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Set what a SuperLink sets for a task; older releases of Flower do not ask."""
    if "flwr" not in sys.modules:
        return
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


@pytest.fixture
def flower_log(caplog):
    """Return what Flower's logger said so far, line by line: it hands nothing on by itself."""
    logger = logging.getLogger("flwr")
    with caplog.at_level(logging.WARNING, logger="flwr"):
        logger.addHandler(caplog.handler)
        yield lambda: list(dict.fromkeys(r.getMessage() for r in caplog.records))
        logger.removeHandler(caplog.handler)
