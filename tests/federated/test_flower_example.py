"""The Flower app in the examples runs on the grid in one process."""

import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import Context, RecordDict

from tests.fast import fast_for
from tests.inspection.crafts import PUBLISHED
from vitguard.defenses.encryption import keyfile
from vitguard.federated.flower import InProcessGrid

APP = Path(__file__).parents[2] / "examples" / "flower_cifar10"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The app of the example with keys of its own: its modules, and a grid of four clients."""
    monkeypatch.syspath_prepend(str(APP))
    monkeypatch.setenv("VITGUARD_KEYS", str(tmp_path))
    monkeypatch.delenv("VITGUARD_DATA", raising=False)
    monkeypatch.setenv("VITGUARD_PASSPHRASE", "a passphrase")
    monkeypatch.setattr(keyfile, "_COST", 1 << 4)  # passphrases are not what is tested here
    monkeypatch.setattr(keyfile, "_COSTS", (1 << 4,))
    import make_keys
    from flower_cifar10 import client_app, server_app

    make_keys.main(str(tmp_path))
    yield server_app, InProcessGrid(dict.fromkeys((21, 22, 23, 24), client_app.app))
    for name in ("make_keys", *[n for n in sys.modules if n.startswith("flower_cifar10")]):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_clients_of_the_example_refuse_crafted_weights_in_one_line(example, monkeypatch):
    from flower_cifar10 import task
    from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType

    _, grid = example
    config = {"num-server-rounds": 1, "local-epochs": 1, "lr": 0.01, "variant": "plain"}
    for node in grid.contexts.values():
        node.run_config.update(config)
    model = task.make_model()
    task.protected(model, config)
    honest = model.state_dict()

    def answer(weights):
        content = RecordDict({"arrays": ArrayRecord(weights), "config": ConfigRecord({})})
        (reply,) = grid.send_and_receive([Message(content, 21, MessageType.TRAIN)])
        return reply

    assert not answer(honest).has_error()
    for craft in PUBLISHED.values():
        plain = task.make_model()
        plain.load_state_dict(honest, strict=False)
        reply = answer(honest | craft(plain))
        assert reply.has_error()
        assert "Expected weights without signs of a craft" in reply.error.reason
        assert "\n" not in reply.error.reason
    assert not answer(honest).has_error()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", fast_for(["encrypted", "masks", "private", "records"], fast=["encrypted"])
)
def test_the_example_trains_on_four_clients(variant, example, monkeypatch):
    server_app, grid = example
    config = {"num-server-rounds": 2, "local-epochs": 1, "lr": 0.01, "variant": variant}
    for node in grid.contexts.values():
        node.run_config.update(config)
    kept = []
    send = grid.send_and_receive

    def sending(messages, **options):
        replies = list(send(messages, **options))
        assert not any(r.has_error() for r in replies), [str(r.error) for r in replies]
        if any(r.content.metric_records for r in replies):  # no short phase of masks
            kept.append(replies)
        return replies

    monkeypatch.setattr(grid, "send_and_receive", sending)
    server_app.app(grid, Context(1, 1, {}, RecordDict(), config))
    trained, evaluated = kept[::2], kept[1::2]
    assert len(trained) == len(evaluated) == 2
    for replies in evaluated:
        assert len(replies) == 4
        assert all("accuracy" in r.content["metrics"] for r in replies)
    for replies in trained:
        assert len(replies) == 4
        for reply in replies:
            (metrics,) = reply.content.metric_records.values()
            assert math.isfinite(float(metrics["loss"]))
            assert ("epsilon" in metrics) == (variant in ("private", "records"))
