"""A floor on the images behind an update counts what a Flower client says of itself."""

import pytest

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import vitguard as vg
from tests.federated.flower_rounds import NODES, tiny
from vitguard.federated.flower import InProcessGrid, ProtectMod, attach


@pytest.mark.parametrize(("examples", "replies"), [(1, 0), (64, 2)])
def test_the_examples_of_a_client_are_the_images_behind_its_update(small_vit, examples, replies):
    app = ClientApp(mods=[ProtectMod()])

    @app.train()
    def train(message, context):
        model = tiny(small_vit)
        attach(vg.protect(model, "batch-floor"))
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        for parameter in model.parameters():
            parameter.data.add_(0.01)
        metrics = MetricRecord({"num-examples": examples})
        arrays = ArrayRecord({k: t.clone() for k, t in model.state_dict().items()})
        return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    grid, good = InProcessGrid(dict.fromkeys(NODES[:2], app)), []
    strategy = FedAvg(fraction_evaluate=0.0)
    inner = strategy.aggregate_train

    def aggregate(number, messages):
        messages = list(messages)
        good.extend(m for m in messages if not m.has_error())
        return inner(number, messages)

    strategy.aggregate_train = aggregate
    strategy.start(grid, ArrayRecord(tiny(small_vit).state_dict()), num_rounds=1)
    assert len(good) == replies
