"""Faults of a Flower federation over several rounds: restarts, clipping, another model."""

import pickle

import pytest
import torch

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import (
    array_record_from_proto,
    array_record_to_proto,
    context_from_proto,
    context_to_proto,
)

from tests.federated.flower_rounds import NODES, Federated, each
from vitguard.defenses.encryption import backend
from vitguard.federated.flower import records


@pytest.fixture
def federated(small_vit):
    return Federated(small_vit)


def before_each_round(federated, act):
    """Call `act(round)` before the messages of each round are sent."""
    original, rounds = federated.grid.send_and_receive, iter(range(1, 99))

    def send(messages, **options):
        if messages := list(messages):
            act(next(rounds))
        return original(messages, **options)

    federated.grid.send_and_receive = send


def through_bytes(context):
    proto = context_to_proto(context)
    return context_from_proto(type(proto).FromString(proto.SerializeToString()))


@pytest.mark.slow
def test_client_processes_that_restart_in_every_round_lose_nothing(federated):
    """All that a new process has is its files and the bytes of its state."""

    def restart(_):
        for node in NODES:
            federated.grid.contexts[node] = through_bytes(federated.grid.contexts[node])
            federated.grid.apps[node] = federated.app(node)
        backend.shared_engine.cache_clear()

    before_each_round(federated, restart)
    strategy, _ = federated.run(4)
    assert not any(strategy.refused.values())
    federated.check(federated.seen[12][-1], NODES, NODES, NODES)
    assert not federated.unsealed()


@pytest.mark.slow
def test_a_server_that_restarts_between_rounds_goes_on_from_what_it_saved(federated):
    saved = ArrayRecord(federated.start)
    for number in range(4):
        if number % 2:
            read = pickle.loads(pickle.dumps(saved))
        else:
            proto = array_record_to_proto(saved).SerializeToString()
            read = array_record_from_proto(type(array_record_to_proto(saved)).FromString(proto))
        strategy, result = federated.run(1, initial=read)
        assert strategy.refused == {1: {}}
        saved = result.arrays
    federated.check(federated.seen[13][-1], NODES, NODES, NODES)


@pytest.mark.slow
def test_a_server_that_was_set_back_one_round_is_refused_by_every_client(federated):
    """Two sums of one round that differ by a client would give that client away."""
    _, first = federated.run(1)
    federated.run(2, initial=first.arrays)  # a server that forgot this
    seen = {n: len(w) for n, w in federated.seen.items()}
    strategy, result = federated.run(1, initial=first.arrays)
    assert set(strategy.refused[1]) == set(NODES)
    assert seen == {n: len(w) for n, w in federated.seen.items()}  # no app was called
    assert records.History.of(result.arrays).last_round == 1


def clips(values):
    """A client whose first `values` values are beyond the bound."""

    def spoil(state, metrics):
        state = {k: t.clone() for k, t in state.items()}
        state["head.weight"].view(-1)[:values] = 50.0
        return state, metrics

    return spoil


@pytest.mark.parametrize(("values", "taken"), [(0, True), (3, True), (4, False), (24, False)])
def test_a_client_that_clips_more_than_the_server_allows_is_refused(federated, values, taken):
    federated.outliers[12] = "clip"
    federated.spoil[12] = clips(values)
    strategy, _ = federated.run(1, max_clipped=3)
    assert (12 not in strategy.refused[1]) == taken
    if not taken:
        assert f"{values} values beyond bounds" in strategy.refused[1][12]
        federated.spoil.clear()
        federated.run(1, initial=strategy._history.record())
        federated.check(federated.seen[11][-1], [n for n in NODES if n != 12])


def test_a_client_that_clips_is_taken_by_a_server_without_a_limit_and_the_count_is_told(federated):
    federated.outliers[12] = "clip"
    federated.spoil[12] = each(lambda t: t + 100)
    strategy, result = federated.run(1)
    assert strategy.refused == {1: {}}
    assert result.train_metrics_clientapp[1]["vitguard-clipped"] > 0


@pytest.mark.parametrize("said", [-1, 10**9, 1.5, True])
def test_a_count_of_clipped_values_that_is_none_is_refused(federated, said):
    app = federated.app(12)

    def lies(message, context):
        reply = app(message, context)
        (metrics,) = reply.content.metric_records.values()
        metrics["vitguard-clipped"] = said
        return reply

    federated.grid.apps[12] = lies
    strategy, _ = federated.run(1, max_clipped=3)
    assert list(strategy.refused[1]) == [12]


def test_a_message_without_a_round_of_this_strategy_seals_nothing(federated):
    """A round in words, or a version that is no text, is no round."""

    def act(_):
        federated.grid.contexts[12].state = RecordDict()

    before_each_round(federated, act)
    strategy = federated.strategy()
    original = strategy._said
    for wrong in ({"vitguard-round": "1"}, {"vitguard-base": 3}):
        strategy._said = lambda config, wrong=wrong: ConfigRecord({**original(config), **wrong})
        federated.run(1, strategy)
        assert set(strategy.refused[1]) == set(NODES)
        assert all("round without number" in r for r in strategy.refused[1].values())


def test_a_client_that_has_another_model_is_refused_and_never_asked_to_train(federated):
    other = {k: t + 0.1 if t.is_floating_point() else t for k, t in federated.start.items()}
    federated.run(1)
    federated.grid.contexts[12].state["vitguard.model"] = ArrayRecord(other)
    kept = federated.grid.contexts[12].state.config_records["vitguard.kept"]
    kept["progress"] = '{"base": "' + 64 * "0" + '", "opened": 0}'
    strategy, result = federated.run(1)
    assert list(strategy.refused[1]) == [12] and "version" in strategy.refused[1][12]
    assert len(federated.seen[12]) == 1
    assert torch.equal(federated.seen[11][-1]["head.weight"], federated.start["head.weight"])
    assert records.History.of(result.arrays).last_round == 1
