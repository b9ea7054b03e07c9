"""Metrics that disagree, evaluations that go wrong, and strategies around ours."""

import math
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

import vitguard as vg
from tests.fast import crossed
from tests.federated.flower_rounds import NODES, Federated, tiny
from tests.federated.masked_rounds import Masked
from vitguard.defenses.encryption import Manifest, SigningKey
from vitguard.errors import Incompatible, InputError
from vitguard.federated.flower import (
    ClientKeys,
    EncryptedFedAvg,
    Federation,
    MaskedFedAvg,
    MaskedFederation,
    MaskingIdentity,
    ProtectMod,
    aggregate_metrics,
    make_keys,
    write_masked_keys,
)
from vitguard.federated.flower.records import SEALED

BOTH = pytest.mark.parametrize("kind", [Federated, Masked])


def told(**metrics):
    return lambda state, own: (state, own | metrics)


@BOTH
@pytest.mark.parametrize("node", [NODES[0], NODES[-1]])
def test_a_metric_of_another_kind_or_length_is_left_out_and_the_rounds_go_on(small_vit, kind, node):
    federated = kind(small_vit)
    for each in federated.names:
        federated.spoil[each] = told(losses=[1.0, 2.0], shared=3.0)
    federated.spoil[node] = told(losses=[1.0], loss=[0.5, 0.25], shared=3.0)
    strategy, result = federated.run(2)
    assert strategy.refused == {1: {}, 2: {}}
    assert result.train_metrics_clientapp[2]["shared"] == pytest.approx(3.0)
    assert not {"losses", "loss"} & {*result.train_metrics_clientapp[2]}


def answers(metrics):
    def change(reply, message):
        record = RecordDict({} if metrics is None else {"metrics": MetricRecord(metrics)})
        return Message(record, reply_to=message)

    return change


WEIGHTLESS = {
    "none": None,
    "no weight": {"mean": 1e6},
    "0": {"mean": 1e6, "num-examples": 0},
    "-9": {"mean": 1e6, "num-examples": -9},
    "nan": {"mean": 1e6, "num-examples": math.nan},
    "inf": {"mean": 1e6, "num-examples": math.inf},
    "list": {"mean": 1e6, "num-examples": [1, 2]},
}


@pytest.mark.slow
@pytest.mark.parametrize(("what", "kind"), crossed(WEIGHTLESS, [Federated, Masked]))
def test_an_evaluation_without_a_weight_is_left_out_and_ends_no_run(small_vit, kind, what):
    federated = kind(small_vit)
    spoil_evaluation(federated, NODES[1], answers(WEIGHTLESS[what]))
    _, result = federated.run(2, fraction_evaluate=1.0)
    assert abs(result.evaluate_metrics_clientapp[2]["mean"]) < 10


@BOTH
def test_an_evaluation_with_other_metrics_leaves_those_that_all_have(small_vit, kind):
    federated = kind(small_vit)
    other = answers({"accuracy": 1.0, "mean": [1.0], "num-examples": 1})
    spoil_evaluation(federated, NODES[1], other)
    _, result = federated.run(1, fraction_evaluate=1.0)
    assert dict(result.evaluate_metrics_clientapp[1]) == {}


@BOTH
def test_an_evaluation_that_comes_twice_counts_once(small_vit, kind, flower_log):
    federated = kind(small_vit)
    values = {node: float(i) for i, node in enumerate(federated.names)}
    for node, value in values.items():
        spoil_evaluation(federated, node, answers({"mean": value, "num-examples": 1}))
    send = federated.grid.send_and_receive

    def twice(messages, **options):
        for reply in send(messages, **options):
            yield reply
            about = reply.metadata
            if about.message_type.startswith("evaluate") and about.src_node_id == NODES[-1]:
                yield reply

    federated.grid.send_and_receive = twice
    _, result = federated.run(1, fraction_evaluate=1.0)
    mean = sum(values.values()) / len(values)
    assert result.evaluate_metrics_clientapp[1]["mean"] == pytest.approx(mean)
    assert [line for line in flower_log() if "second" in line and str(NODES[-1]) in line]


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, math.nan]])
def test_a_metric_that_is_not_finite_is_left_out_with_one_line(small_vit, kind, value, flower_log):
    """Its average would be NaN for all, in training and in evaluation."""
    federated = kind(small_vit)
    rest = {"rest": [1.0, 2.0]} if isinstance(value, list) else {"rest": 1.0}
    for node in federated.names:
        federated.spoil[node] = told(**rest, shared=3.0)
    federated.spoil[NODES[0]] = told(rest=value, shared=3.0)
    for node in federated.names:
        wrong = value if node == NODES[1] else rest["rest"]
        answer = {"mean": 2.0, "rest": wrong, "num-examples": 1}
        spoil_evaluation(federated, node, answers(answer))
    _, result = federated.run(1, fraction_evaluate=1.0)
    trained, evaluated = result.train_metrics_clientapp[1], result.evaluate_metrics_clientapp[1]
    assert trained["shared"] == pytest.approx(3.0) and "rest" not in trained
    assert dict(evaluated) == {"mean": pytest.approx(2.0)}
    assert [line for line in flower_log() if "not finite" in line and "rest" in line]


def spoil_evaluation(federated, node, change):
    app = federated.grid.apps[node]

    def changed(message, context):
        reply = app(message, context)
        evaluation = message.metadata.message_type.startswith("evaluate")
        return change(reply, message) if evaluation else reply

    federated.grid.apps[node] = changed


@pytest.mark.slow
@BOTH
def test_the_epsilon_of_a_round_is_the_largest_of_its_clients_and_clipped_values_add_up(
    small_vit, kind
):
    """The average of clients that spent more and less is what nobody spent."""
    private = [vg.ClientPrivacy(noise=2.0, rounds=9, clip=0.01)]
    federated = kind(small_vit, private=private)
    federated.run(1)
    federated.grid.contexts[NODES[0]].state = RecordDict()  # a client that spent less
    initial = ArrayRecord(federated.start)
    if kind is Federated:
        for node in NODES[1:]:
            kept = federated.grid.contexts[node].state
            kept.pop("vitguard.model", None)
    strategy, result = federated.run(1, federated.strategy(**later(kind)), initial)
    assert strategy.refused == {1: {}}
    assert result.train_metrics_clientapp[1]["epsilon"] == private[0].spent(2).epsilon


def later(kind):
    return {"first_round": 2} if kind is Masked else {}


def test_stock_strategies_can_take_the_largest_epsilon_too():
    def of(weight, epsilon, clipped):
        metrics = {"num-examples": weight, "epsilon": epsilon, "vitguard-clipped": clipped}
        return RecordDict({"metrics": MetricRecord({**metrics, "loss": epsilon})})

    together = aggregate_metrics([of(1, 4.0, 3), of(3, 2.0, 4)], "num-examples")
    assert dict(together) == {"epsilon": 4.0, "vitguard-clipped": 7.0, "loss": 2.5}


@pytest.mark.parametrize(
    "around",
    [DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping],
)
def test_a_strategy_around_encryption_is_refused_at_once(small_vit, around):
    federated = Federated(small_vit)
    outer = around(federated.strategy(), 1.0, 1.0, len(NODES))
    with pytest.raises(Incompatible, match=r"EncryptedFedAvg\.start"):
        outer.start(federated.grid, ArrayRecord(federated.start), num_rounds=2)
    assert not federated.seen


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, version("flwr").split(".")[:2])) < (1, 27),
    reason="wrappers of older Flower read replies before the exchanges of masks: the round fails",
)
def test_noise_of_the_server_around_masks_keeps_ledgers_and_terms(small_vit):
    """Central privacy around masks works, and nothing that the strategy guards is left out."""
    private = [vg.ClientPrivacy(noise=1.0, rounds=9, clip=0.01)]
    masked = Masked(small_vit, private=private)
    inner = masked.strategy(wrapped=True)
    outer = DifferentialPrivacyClientSideFixedClipping(inner, 1e-6, 1.0, 6)
    outer.start(masked.grid, ArrayRecord(masked.start), num_rounds=1)
    assert set(inner.ledgers.nodes) == set(masked.names)
    masked.grid.contexts[12].state = RecordDict()  # lost
    outer.start(masked.grid, ArrayRecord(masked.start), num_rounds=1)
    assert {n: len(w) for n, w in masked.seen.items()} == {n: 1 + (n != 12) for n in masked.names}
    lacking = {k: t for k, t in masked.start.items() if k != "head.weight"}
    with pytest.raises(InputError, match=r"head\.weight"):
        outer.start(masked.grid, ArrayRecord(lacking), num_rounds=1)


def test_keys_of_another_model_are_refused_before_the_first_round(small_vit):
    federated = Federated(small_vit)
    lacking = {k: t for k, t in federated.start.items() if k != "head.weight"}
    with pytest.raises(InputError, match=r"head\.weight"):
        federated.run(1, initial=ArrayRecord(lacking))
    wider = {**federated.start, "head.weight": torch.zeros(3, 12)}
    with pytest.raises(InputError, match=r"\(3, 12\)"):
        federated.run(1, initial=ArrayRecord(wider))
    assert not federated.seen


def test_a_run_in_which_every_round_failed_ends_at_the_model_it_began_with(small_vit):
    masked = Masked(small_vit)
    masked.attached = dict.fromkeys(masked.attached, False)
    _, result = masked.run(2)
    after = result.arrays.to_torch_state_dict()
    assert after.keys() == masked.start.keys()
    assert all(torch.equal(after[n], t) for n, t in masked.start.items())


@BOTH
def test_plain_values_that_only_a_larger_type_holds_are_refused(small_vit, kind):
    """Of a model in float32 one client's 1e300 would make infinity for all."""
    federated = kind(small_vit, select="blocks")
    app = federated.grid.apps[NODES[0]]

    def huge(message, context):
        reply = app(message, context)
        if reply.has_error() or not reply.content.array_records:
            return reply
        ((name, arrays),) = reply.content.array_records.items()
        large = {
            k: a if k == SEALED else Array(torch.full(a.shape, 1e300, dtype=torch.float64).numpy())
            for k, a in arrays.items()
        }
        return Message(RecordDict({**reply.content, name: ArrayRecord(large)}), reply_to=message)

    federated.grid.apps[NODES[0]] = huge
    strategy, _ = federated.run(1)
    assert list(strategy.refused[1]) == [NODES[0]] and "finite" in strategy.refused[1][NODES[0]]


@BOTH
@pytest.mark.parametrize("what", ["leaves out", "adds"])
def test_one_client_does_not_say_which_plain_tensors_are_sent(small_vit, kind, what, monkeypatch):
    """Were it the first to answer, all others would be refused, or fixed positions would move."""
    monkeypatch.setattr("random.sample", lambda nodes, count: sorted(nodes)[:count])
    federated = kind(small_vit, select="blocks")
    first, app = NODES[0], federated.grid.apps[NODES[0]]

    def change(message, context):
        reply = app(message, context)
        if reply.has_error() or not reply.content.array_records:
            return reply
        ((name, arrays),) = reply.content.array_records.items()
        if what == "adds":
            positions = torch.ones_like(federated.start["pos_embed"])
            sent = {**arrays, "pos_embed": Array(positions.numpy())}
        else:
            sent = {SEALED: arrays[SEALED]}
        return Message(RecordDict({**reply.content, name: ArrayRecord(sent)}), reply_to=message)

    federated.grid.apps[first] = change
    strategy, _ = federated.run(2)
    assert strategy.refused == {1: {}, 2: {}}
    seen, start = federated.seen[NODES[1]][1], federated.start
    assert torch.allclose(seen["pos_embed"], start["pos_embed"], atol=1e-6)
    moved = [(n - 10) * 0.001 * (n - 10) * (what == "adds" or n != first) for n in federated.names]
    due = sum(moved) / sum(n - 10 for n in federated.names)
    assert torch.allclose(seen["head.weight"], start["head.weight"] + due, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mod", ["fixedclipping_mod", "adaptiveclipping_mod"])
@BOTH
def test_the_clipping_mods_of_flower_work_behind_protect_mod(small_vit, kind, mod):
    """They take a message with one ConfigRecord, as Flower sends it."""
    federated = kind(small_vit)
    clips = getattr(pytest.importorskip("flwr.clientapp.mod"), mod)
    for node in federated.names:
        outer = ProtectMod(identity=lambda context, node=node: federated.identity(node))
        if kind is Federated:
            name = federated.names[node]
            keys = ClientKeys(name, federated.keys.for_client(name), federated.manifest)
            outer = ProtectMod(lambda context, keys=keys: keys)
        federated.grid.apps[node] = federated.app(node, [outer, clips])
    strategy = federated.strategy()
    start, config = ArrayRecord(federated.start), ConfigRecord({"clipping_norm": 1e-3})
    strategy.start(federated.grid, start, num_rounds=2, train_config=config)
    assert strategy.refused == {1: {}, 2: {}}
    before, after = (next(iter(federated.seen.values()))[i] for i in (0, 1))
    moved = torch.cat([(after[n] - before[n]).flatten() for n in after if n != "pos_embed"])
    assert 0 < float(moved.norm()) < 2e-3


@pytest.mark.parametrize("clients", ["01", "hospital", 3, [], ["0"], ["0", "0"], ["0", None]])
def test_names_of_clients_that_are_none_leave_no_key_behind(small_vit, tmp_path, clients):
    guard = vg.protect(tiny(small_vit), "encryption")
    with pytest.raises(InputError, match="client"):
        make_keys(tmp_path, "pass", guard.encrypted(), clients=clients, bounds=1.0, max_weight=4.0)
    assert not list(tmp_path.iterdir())


def test_the_parties_of_one_scheme_are_not_taken_for_those_of_the_other(small_vit):
    federated, masked = Federated(small_vit), Masked(small_vit)
    plain = Federation(federated.keys.for_server(), federated.signing, federated.manifest)
    under = MaskedFederation(masked.signing, masked.terms)
    for wrong in (None, under):
        with pytest.raises(InputError, match=r"Federation\.from_environment"):
            EncryptedFedAvg(wrong)
    for wrong in (None, plain):
        with pytest.raises(InputError, match=r"MaskedFederation\.from_environment"):
            MaskedFedAvg(wrong)


def test_keys_may_be_named_by_partition(small_vit, tmp_path, monkeypatch):
    from vitguard.defenses.encryption import keyfile

    monkeypatch.setattr(keyfile, "_COST", 1 << 4)
    guard = vg.protect(tiny(small_vit), "encryption")
    make_keys(tmp_path, "pass", guard.encrypted(), clients=range(2), bounds=1.0, max_weight=4.0)
    assert (tmp_path / "client-1.keys").exists()
    with pytest.raises(InputError, match="by its name"):
        write_masked_keys(tmp_path, "pass", None, ["0", "1", "2"])


def test_keys_that_are_made_anew_in_a_process_are_those_that_its_clients_load(
    small_vit, tmp_path, monkeypatch
):
    from vitguard.defenses.encryption import keyfile

    monkeypatch.setattr(keyfile, "_COST", 1 << 4)
    monkeypatch.setattr(keyfile, "_COSTS", (1 << 4,))
    for name, value in (("KEYS", str(tmp_path)), ("PASSPHRASE", "p"), ("CLIENT", "0")):
        monkeypatch.setenv(f"VITGUARD_{name}", value)
    encrypted = vg.protect(tiny(small_vit), "encryption").encrypted()
    context = Context(1, 1, {}, RecordDict(), {})
    for bound in (1.0, 2.0):
        for file in tmp_path.iterdir():
            file.unlink()
        settings = {"bounds": bound, "max_weight": 4.0}
        make_keys(tmp_path, "p", encrypted, clients=range(2), **settings)
        manifest = Manifest.of(encrypted, **settings)
        assert ClientKeys.from_environment(context).manifest.entries == manifest.entries
        identities = {name: SigningKey.generate() for name in "012"}
        terms = write_masked_keys(tmp_path, "p", manifest, identities)
        assert MaskingIdentity.from_environment(context).terms == terms
