"""The Flower app in the examples runs on the grid in one process."""

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import Context, RecordDict

from vitguard.federated.flower import InProcessGrid

APP = Path(__file__).parents[2] / "examples" / "flower_cifar10"


@pytest.mark.parametrize("private", [False, True], ids=["encrypted", "private"])
def test_the_example_trains_on_four_clients(private, tmp_path, monkeypatch):
    identity = "flwr.supercore.task_identity"
    for name in ("task_id", "run_id", "node_id") if find_spec(identity) else ():
        monkeypatch.setattr(f"{identity}.TaskIdentity._{name}", 1)
    monkeypatch.syspath_prepend(str(APP))
    monkeypatch.setenv("VITGUARD_KEYS", str(tmp_path))
    monkeypatch.setenv("VITGUARD_PASSPHRASE", "a passphrase")
    import make_keys
    from flower_cifar10 import client_app, server_app

    make_keys.main(str(tmp_path))
    grid = InProcessGrid(dict.fromkeys((21, 22, 23, 24), client_app.app))
    config = {"num-server-rounds": 2, "local-epochs": 1, "lr": 0.01, "privacy": private}
    for node in grid.contexts.values():
        node.run_config.update(config)
    kept = []
    send = grid.send_and_receive

    def sending(messages, **options):
        kept.append(send(list(messages), **options))
        return kept[-1]

    monkeypatch.setattr(grid, "send_and_receive", sending)
    server_app.app(grid, Context(1, 1, {}, RecordDict(), config))
    trained = [replies for replies in kept if replies]
    assert len(trained) == 2
    for replies in trained:
        assert len(replies) == 4
        for reply in replies:
            assert not reply.has_error(), reply.error.reason
            (metrics,) = reply.content.metric_records.values()
            assert math.isfinite(float(metrics["loss"]))
            assert ("epsilon" in metrics) == private
    for name in ("make_keys", *[n for n in sys.modules if n.startswith("flower_cifar10")]):
        sys.modules.pop(name, None)
