"""The number of examples that a reply claims is the weight that its sealed message proves."""

import pytest

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import Message, MetricRecord, RecordDict

from tests.federated.flower_rounds import NODES, Federated


@pytest.mark.parametrize("claimed", [1, 3.0, 16])
def test_a_claimed_weight_that_is_not_the_sealed_one_is_refused(small_vit, claimed):
    federated = Federated(small_vit)
    app = federated.app(12)

    def claiming(message, context):
        reply = app(message, context)
        ((name, metrics),) = reply.content.metric_records.items()
        content = {**reply.content, name: MetricRecord({**metrics, "num-examples": claimed})}
        return Message(content=RecordDict(content), reply_to=message)

    federated.grid.apps[12] = claiming
    strategy, result = federated.run(1)
    assert list(strategy.refused[1]) == [12] and "claimed weight" in strategy.refused[1][12]
    federated.grid.apps[12] = app
    federated.run(1, initial=result.arrays)
    left = [n for n in NODES if n != 12]
    moved = federated.seen[11][-1]["head.weight"] - federated.start["head.weight"]
    assert float(moved.mean()) == pytest.approx(federated.moved(left), rel=0.2)
