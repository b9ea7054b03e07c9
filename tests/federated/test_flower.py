"""Faults in a Flower round, on Flower's own messages: the round goes on, or fails in one line."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, Krum

import vitguard as vg
from vitguard.defenses.encryption import KeySet, Manifest, SigningKey
from vitguard.errors import Incompatible, InputError
from vitguard.federated.flower import (
    ClientKeys,
    EncryptedFedAvg,
    Federation,
    InProcessGrid,
    ProtectMod,
    attach,
    encryptor,
    make_keys,
)
from vitguard.federated.flower.records import SEALED, History

NODES = (11, 12, 13, 14)
BOUND = 1.0


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Flower's messages ask which task they are made in."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:  # older releases do not ask
        return
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


def tiny(small_vit):
    return small_vit(img_size=8, embed_dim=12, depth=1, num_heads=3, num_classes=2)


class Federated:
    """Four nodes, their keys, and what each does to its weights: every node adds a constant."""

    def __init__(self, small_vit, select="all"):
        self.small_vit, self.select = small_vit, select
        self.signing = SigningKey.generate()
        self.keys = KeySet.generate(server=self.signing.public_bytes())
        rehearsal = vg.protect(tiny(small_vit), self.stack(), generator=torch.Generator())
        self.manifest = Manifest.of(rehearsal.encrypted(), bounds=BOUND, max_weight=16.0)
        self.start = {k: t.clone() for k, t in rehearsal.export().items()}
        self.names = {node: str(i) for i, node in enumerate(NODES)}
        self.node_keys = dict.fromkeys(NODES, self.keys)
        self.spoil = {}
        self.seen = {}
        self.attached = dict.fromkeys(NODES, True)
        self.grid = InProcessGrid({n: self.app(n) for n in NODES}, record=True)

    def stack(self, sealing=None):
        positions = vg.FixedPositions("sincos")
        force = self.select != "all"
        return [
            positions,
            vg.EncryptedGradients(select=self.select, force=force, encryptor=sealing),
        ]

    def app(self, node, mods=None):
        def keys(context):
            own = self.node_keys[node]
            return ClientKeys(self.names[node], own.for_client(self.names[node]), self.manifest)

        app = ClientApp(mods=[ProtectMod(keys)] if mods is None else mods)

        @app.train()
        def train(message, context):
            model = tiny(self.small_vit)
            guard = vg.protect(model, self.stack(encryptor()))
            if self.attached[node]:
                attach(guard)
            given = message.content["arrays"].to_torch_state_dict()
            model.load_state_dict(given)
            self.seen.setdefault(node, []).append(given)
            state = {
                k: t + 0.001 * (node - 10) if t.is_floating_point() else t
                for k, t in model.state_dict().items()
            }
            metrics = {"num-examples": node - 10, "loss": 0.5}
            spoil = self.spoil.get(node)
            if spoil is not None:
                state, metrics = spoil(state, metrics)
            content = {"arrays": ArrayRecord(state)}
            if metrics is not None:
                content["metrics"] = MetricRecord(metrics)
            return Message(content=RecordDict(content), reply_to=message)

        @app.evaluate()
        def evaluate(message, context):
            given = message.content["arrays"].to_torch_state_dict()
            mean = float(given["head.weight"].mean())
            metrics = MetricRecord({"mean": mean, "num-examples": 1})
            return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

        return app

    def strategy(self, **settings):
        federation = Federation(self.keys.for_server(), self.signing, self.manifest)
        return EncryptedFedAvg(federation, **({"fraction_evaluate": 0.0} | settings))

    def run(self, rounds=1, strategy=None, initial=None, **settings):
        strategy = strategy or self.strategy(**settings)
        arrays = initial or ArrayRecord(self.start)
        return strategy, strategy.start(self.grid, arrays, num_rounds=rounds)

    def moved(self, nodes=NODES):
        """What one round adds to each encrypted value: the average weighted by examples."""
        return sum(0.001 * (n - 10) ** 2 for n in nodes) / sum(n - 10 for n in nodes)

    def step(self, weights, name="head.weight"):
        return float((weights[name] - self.start[name]).mean())


@pytest.fixture
def federated(small_vit):
    return Federated(small_vit)


def test_each_round_adds_the_weighted_average(federated):
    strategy, _ = federated.run(3)
    assert strategy.refused == {1: {}, 2: {}, 3: {}}
    second, third = federated.seen[11][1], federated.seen[11][2]
    for weights, rounds in ((second, 1), (third, 2)):
        assert federated.step(weights) == pytest.approx(rounds * federated.moved(), rel=0.2)
        assert torch.equal(weights["pos_embed"], federated.start["pos_embed"])
    for node in NODES[1:]:
        for ours, theirs in zip(federated.seen[11], federated.seen[node], strict=True):
            assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_nothing_that_left_holds_the_weights_of_a_client(federated):
    federated.run(2)
    moved = [
        (t.float() + 0.001 * (n - 10)).numpy().tobytes()
        for n in NODES
        for weights in federated.seen[n]
        for k, t in weights.items()
        if k != "pos_embed" and t.numel() >= 8
    ]
    moved += [np.full(8, 0.001 * (n - 10), dtype="<f4").tobytes() for n in NODES]
    everything = b"".join(federated.grid.sent)
    assert len(moved) > 50 and not any(m[:32] in everything for m in moved)
    start = federated.start["head.weight"].numpy().tobytes()
    assert start in everything  # the search finds what is there


def raises(state, metrics):
    raise RuntimeError("a secret pixel 123456789")


def each(change):
    return lambda state, metrics: (
        {k: change(t) if t.is_floating_point() else t for k, t in state.items()},
        metrics,
    )


def weighs(number):
    return lambda state, metrics: (state, metrics | {"num-examples": number})


FAULTS = {
    "raises": (raises, "RuntimeError"),
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
    expected = federated.moved([n for n in NODES if n != 12])
    assert federated.step(federated.seen[11][-1]) == pytest.approx(expected, rel=0.2)
    assert b"secret pixel" not in b"".join(federated.grid.sent)


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


def test_a_node_that_was_away_gets_the_sums_that_it_lacks(federated):
    strategy, result = federated.run(1)
    federated.grid.absent = {12}
    strategy, result = federated.run(2, federated.strategy(), result.arrays)
    federated.grid.absent = set()
    strategy, _ = federated.run(1, federated.strategy(), result.arrays)
    assert strategy.refused == {1: {}}
    assert federated.step(federated.seen[12][-1]) == pytest.approx(
        federated.step(federated.seen[11][-1]), abs=1e-6
    )


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


def test_a_client_that_has_another_model_is_refused(federated):
    federated.run(1)
    other = {k: t + 0.1 if t.is_floating_point() else t for k, t in federated.start.items()}
    federated.grid.contexts[12].state = RecordDict()
    federated.run(1, initial=ArrayRecord(federated.start))
    for node in (11, 13):
        federated.grid.contexts[node].state = RecordDict()
    strategy, _ = federated.run(1, initial=ArrayRecord(other))
    assert set(strategy.refused[1]) >= {12, 14}
    assert all("version of the model" in strategy.refused[1][n] for n in (12, 14))


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
    arrays = ArrayRecord({SEALED: Array("uint8", (3,), SEALED, b"abc")})
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
    assert mean - start == pytest.approx(federated.moved(), rel=0.2)
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
    for name in ("head.weight", "blocks.0.attn.qkv.weight"):
        assert federated.step(weights, name) == pytest.approx(federated.moved(), rel=0.2)
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


def test_client_privacy_adds_up_over_rounds_under_a_stock_strategy(small_vit):
    start = tiny(small_vit).state_dict()
    grid = InProcessGrid({n: private_app(small_vit, 3) for n in NODES[:2]})
    result = FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord(start), num_rounds=4)
    spent = [m["epsilon"] for m in result.train_metrics_clientapp.values()]
    privacy = vg.ClientPrivacy(epsilon=4.0, rounds=3)
    closed = [privacy.spent(r).epsilon for r in (1, 2, 3)]
    assert spent == pytest.approx(closed) and len(spent) == 3  # the fourth was refused
    assert closed[-1] <= 4.0


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
