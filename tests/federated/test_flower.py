"""Faults in a Flower round, on Flower's own messages: the round goes on, or fails in one line."""

import math

import pytest
import torch

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, Krum

import vitguard as vg
from tests.federated.flower_rounds import (
    BOUND,
    NODES,
    Federated,
    each,
    quotes,
    raises,
    tiny,
    weighs,
)
from vitguard.defenses.encryption import KeySet
from vitguard.errors import Incompatible, InputError
from vitguard.federated.flower import (
    ClientKeys,
    EncryptedFedAvg,
    Federation,
    InProcessGrid,
    ProtectMod,
    attach,
    make_keys,
)
from vitguard.federated.flower import client as client_module
from vitguard.federated.flower.records import SEALED, SEALED_TYPE, History


@pytest.fixture
def federated(small_vit):
    return Federated(small_vit)


@pytest.mark.slow
def test_each_round_adds_the_weighted_average_within_the_bound_of_the_preset(federated):
    strategy, _ = federated.run(3)
    assert strategy.refused == {1: {}, 2: {}, 3: {}}
    second, third = federated.seen[11][1], federated.seen[11][2]
    federated.check(second, NODES)
    federated.check(third, NODES, NODES)
    assert federated.worst() < 0.05 * federated.moved()  # the bound is no excuse
    for weights in (second, third):
        assert torch.equal(weights["pos_embed"], federated.start["pos_embed"])
    for node in NODES[1:]:
        for ours, theirs in zip(federated.seen[11], federated.seen[node], strict=True):
            assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_nothing_that_left_holds_the_weights_of_a_client(federated):
    federated.run(2)
    assert len(federated.own) == 8 and not federated.unsealed()


FAULTS = {
    "raises": (raises, "RuntimeError"),
    "quotes its data": (quotes, "input that the app takes"),
    "NaN": (each(lambda t: torch.full_like(t, math.nan)), "finite"),
    "infinity": (each(lambda t: torch.full_like(t, math.inf)), "finite"),
    "beyond the bound": (each(lambda t: t + 100), "bound"),
    "another shape": (each(lambda t: torch.cat([t, t])), "shape"),
    "other keys": (lambda s, m: ({f"x.{k}": t for k, t in s.items()}, m), "weights"),
    "no metrics": (lambda s, m: (s, None), "MetricRecord"),
    "no weight": (lambda s, m: (s, {"loss": 1.0}), "num-examples"),
    "weight 0": (weighs(0), "weight"),
    "weight -1": (weighs(-1), "weight"),
    "weight 1e9": (weighs(1e9), "weight"),
    "weight NaN": (weighs(math.nan), "weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_round_goes_on_without_a_faulty_client(federated, fault):
    spoil, said = FAULTS[fault]
    federated.spoil[12] = spoil
    strategy, _ = federated.run(1)
    assert list(strategy.refused[1]) == [12] and said in strategy.refused[1][12]
    federated.spoil.clear()
    federated.run(1, strategy=None, initial=strategy._history.record())
    federated.check(federated.seen[11][-1], [n for n in NODES if n != 12])
    assert b"secret pixel" not in b"".join(federated.grid.sent)
    assert not federated.unsealed()


@pytest.mark.slow
def test_a_late_client_is_left_out_and_comes_back_after_two_rounds(federated):
    strategy = federated.strategy()
    original = federated.grid.send_and_receive
    rounds = iter(range(1, 9))

    def send(messages, **options):
        if messages := list(messages):
            federated.grid.late = {12} if next(rounds) in (2, 3) else set()
        return original(messages, **options)

    federated.grid.send_and_receive = send
    federated.run(4, strategy)
    assert not any(strategy.refused.values())
    assert all(torch.equal(federated.seen[12][-1][k], t) for k, t in federated.seen[11][-1].items())


@pytest.mark.slow
def test_a_node_that_was_away_gets_the_sums_that_it_lacks(federated):
    strategy, result = federated.run(1)
    federated.grid.absent = {12}
    strategy, result = federated.run(2, federated.strategy(), result.arrays)
    federated.grid.absent = set()
    strategy, _ = federated.run(1, federated.strategy(), result.arrays)
    assert strategy.refused == {1: {}}
    federated.check(federated.seen[12][-1], NODES, *2 * [[n for n in NODES if n != 12]])
    assert all(torch.equal(federated.seen[12][-1][k], t) for k, t in federated.seen[11][-1].items())


@pytest.mark.slow
def test_a_client_that_lost_its_state_catches_up_one_round_later(federated):
    strategy = federated.strategy()
    original, rounds = federated.grid.send_and_receive, iter(range(1, 9))

    def send(messages, **options):
        if (messages := list(messages)) and next(rounds) == 2:
            federated.grid.contexts[12].state = RecordDict()
        return original(messages, **options)

    federated.grid.send_and_receive = send
    federated.run(3, strategy)
    assert list(strategy.refused[2]) == [12] and strategy.refused[3] == {}


@pytest.mark.slow
def test_a_client_that_has_another_model_is_refused(federated):
    federated.run(2)  # all have opened a sum
    other = {k: t + 0.1 if t.is_floating_point() else t for k, t in federated.start.items()}
    federated.grid.contexts[12].state = RecordDict()
    strategy, _ = federated.run(1, initial=ArrayRecord(other))
    assert all("version of the model" in strategy.refused[1][n] for n in (11, 13, 14))
    assert "pos_embed" in strategy.refused[1][12]  # begins anew, and its positions are others


def test_two_clients_with_one_name_count_once(federated):
    federated.names[12] = federated.names[11]
    strategy, _ = federated.run(1)
    ((node, reason),) = strategy.refused[1].items()  # whichever came second
    assert node in (11, 12) and "second message" in reason


def test_a_client_with_another_key_is_refused(federated):
    federated.node_keys[12] = KeySet.generate(server=federated.signing.public_bytes())
    strategy, _ = federated.run(1)
    assert list(strategy.refused[1]) == [12]


def test_a_mod_without_attach_sends_nothing(federated):
    federated.attached[12] = False
    strategy, _ = federated.run(1)
    assert list(strategy.refused[1]) == [12] and "attach" in strategy.refused[1][12]


def plain(message, context):
    state = {k: torch.ones(3) for k in ("head.weight",)}
    content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)


def garbage(message, context):
    arrays = ArrayRecord({SEALED: Array("uint8", (3,), SEALED_TYPE, b"abc")})
    metrics = MetricRecord({"num-examples": 1})
    return Message(content=RecordDict({"a": arrays, "m": metrics}), reply_to=message)


def foreign(message, context):
    arrays = ArrayRecord({"head.weight": Array("object", (3,), "pickle", b"abc")})
    metrics = MetricRecord({"num-examples": 1})
    return Message(content=RecordDict({"a": arrays, "m": metrics}), reply_to=message)


def empty(message, context):
    return Message(content=RecordDict(), reply_to=message)


@pytest.mark.parametrize("app", [plain, garbage, foreign, empty])
def test_a_reply_that_is_no_ciphertext_is_refused(federated, app):
    federated.grid.apps[12] = app
    strategy, _ = federated.run(1)
    assert list(strategy.refused[1]) == [12]


def test_an_app_without_the_mod_refuses_to_attach(federated):
    federated.grid.apps[12] = federated.app(12, mods=[])
    strategy, _ = federated.run(1)
    assert list(strategy.refused[1]) == [12]


def test_an_old_message_is_refused_in_a_later_round(federated):
    held = []
    app = federated.app(12)

    def replay(message, context):
        reply = app(message, context)
        held.append(reply.content)
        return Message(content=held[0], reply_to=message)

    federated.grid.apps[12] = replay
    strategy, _ = federated.run(2)
    assert strategy.refused[1] == {} and list(strategy.refused[2]) == [12]


def test_an_exception_of_the_app_is_in_its_own_log_and_its_text_is_in_no_message(
    federated, monkeypatch
):
    logged = []
    monkeypatch.setattr(client_module, "log", lambda *told, exc_info: logged.append(exc_info))
    federated.spoil[12] = raises
    federated.run(1)
    (error,) = logged
    assert "secret pixel" in str(error)
    assert b"secret pixel" not in b"".join(federated.grid.sent)


def test_too_few_clients_leave_the_model_as_it_was(federated):
    for node in NODES[1:]:
        federated.spoil[node] = raises
    strategy, result = federated.run(1)
    assert len(strategy.refused[1]) == 3
    assert History.of(result.arrays).steps == ()
    federated.spoil.clear()
    _, result = federated.run(1, initial=result.arrays)
    assert [s.number for s in History.of(result.arrays).steps] == [1]


def test_clients_evaluate_what_the_server_cannot_read(federated):
    _, result = federated.run(1, fraction_evaluate=1.0)
    mean = result.evaluate_metrics_clientapp[1]["mean"]
    start = float(federated.start["head.weight"].mean())
    assert abs(mean - start - federated.moved()) <= federated.worst() + 1e-6
    with pytest.raises(Incompatible, match="evaluate_fn"):
        federated.strategy().start(
            federated.grid, ArrayRecord(federated.start), evaluate_fn=lambda *a: None
        )


@pytest.mark.parametrize("other", [FedAdam, Krum])
def test_strategies_that_must_read_updates_are_refused_when_made(other):
    with pytest.raises(Incompatible, match=r"FedOpt|FedAdam|Krum"):
        type("Mixed", (EncryptedFedAvg, other), {})


def test_a_stock_strategy_gets_no_ciphertext_and_no_weights(federated):
    strategy = FedAvg(fraction_evaluate=0.0)
    strategy.start(federated.grid, ArrayRecord(federated.start), num_rounds=1)
    replies = federated.grid.sent[1::2]
    assert len(replies) == 4 and all(len(r) < 1000 for r in replies)


def test_what_the_selection_leaves_plain_is_averaged_too(small_vit):
    federated = Federated(small_vit, select="attention")
    _, result = federated.run(2)
    weights = federated.seen[11][1]
    federated.check(weights, NODES)
    plain = weights["head.weight"] - federated.start["head.weight"]
    assert (plain - federated.moved()).abs().max() < 1e-6
    (first, _) = History.of(result.arrays).steps
    assert "head.weight" in first.plain and "blocks.0.attn.qkv.weight" not in first.plain


def private_app(small_vit, rounds):
    app = ClientApp(mods=[ProtectMod()])

    @app.train()
    def train(message, context):
        model = tiny(small_vit)
        guard = attach(vg.protect(model, [vg.ClientPrivacy(epsilon=4.0, rounds=rounds)]))
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        state = {k: t + 0.5 if t.is_floating_point() else t for k, t in model.state_dict().items()}
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
        assert guard
        return Message(content=content, reply_to=message)

    return app


@pytest.mark.slow
def test_client_privacy_adds_up_over_rounds_under_a_stock_strategy(small_vit):
    start = tiny(small_vit).state_dict()
    grid = InProcessGrid({n: private_app(small_vit, 3) for n in NODES[:2]})
    result = FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord(start), num_rounds=4)
    spent = [m["epsilon"] for m in result.train_metrics_clientapp.values()]
    privacy = vg.ClientPrivacy(epsilon=4.0, rounds=3)
    closed = [privacy.spent(r).epsilon for r in (1, 2, 3)]
    assert spent == pytest.approx(closed) and len(spent) == 3  # the fourth was refused
    assert closed[-1] <= 4.0


@pytest.mark.slow
def test_keys_come_from_files_that_the_environment_names(federated, tmp_path, monkeypatch):
    guard = vg.protect(tiny(federated.small_vit), federated.stack(), generator=torch.Generator())
    make_keys(tmp_path, "pass", guard.encrypted(), clients=["0", "1"], bounds=BOUND, max_weight=4.0)
    context = federated.grid.contexts[11]
    with pytest.raises(InputError, match="VITGUARD_KEYS"):
        ClientKeys.from_environment(context)
    monkeypatch.setenv("VITGUARD_KEYS", str(tmp_path))
    monkeypatch.setenv("VITGUARD_PASSPHRASE", "pass")
    assert ClientKeys.from_environment(context).client == "0"
    assert Federation.from_environment().keys.fingerprint
    for name in ("../0", "", "a/b"):
        context.node_config["partition-id"] = name
        with pytest.raises(InputError):
            ClientKeys.from_environment(context)
