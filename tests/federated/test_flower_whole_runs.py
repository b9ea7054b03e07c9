"""The whole life of a Flower run: processes that die, other strategies, odd weights and states."""

import logging

import pytest
import torch

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import FedProx, Strategy

import vitguard as vg
from tests.federated import masked_rounds
from tests.federated.flower_rounds import NODES, Federated, weighs
from tests.federated.masked_rounds import PHASES, Masked, phase_of
from tests.federated.test_flower_faults import through_bytes
from tests.federated.test_flower_models import Nodes, added, normed, plain
from vitguard.errors import Incompatible, InputError
from vitguard.federated.flower import EncryptedFedAvg, MaskedFedAvg
from vitguard.federated.flower.records import RUN

BOTH = pytest.mark.parametrize("kind", [Federated, Masked])


def dies(grid, node, when=lambda message: True):
    """Once: the app's process ends after it has answered, and its answer and state are lost.

    As a SuperNode does, which then answers in its place.
    """
    app, died = grid.apps[node], []

    def dying(message, context):
        if died or not when(message):
            return app(message, context)
        died.append(message)
        grid.contexts[node] = through_bytes(context)
        app(message, context)
        return Message(Error(3, "ClientApp stopped responding"), reply_to=message)

    grid.apps[node] = dying


@pytest.mark.parametrize("private", [False, True])
def test_a_process_that_dies_in_its_training_is_left_out_and_takes_part_in_the_next_round(
    small_vit, private
):
    stack = (vg.ClientPrivacy(noise=1e-6, clip=1.0, rounds=2),) if private else ()
    federated = Federated(small_vit, private=stack)
    dies(federated.grid, 12)
    strategy, _ = federated.run(2)
    assert strategy.refused[1].keys() == {12} and "stopped responding" in strategy.refused[1][12]
    assert strategy.refused[2] == {} and not federated.unsealed()
    if private:  # what never left was not released
        name = strategy.ledgers.nodes[12]
        assert strategy.ledgers.most[name] == 1
        assert strategy.ledgers.most[strategy.ledgers.nodes[13]] == 2


@pytest.mark.parametrize("phase", PHASES)
def test_a_process_that_dies_in_a_phase_of_masks_is_back_in_the_next_round(
    small_vit, tmp_path, phase
):
    masked = Masked(small_vit)
    masked.folder = tmp_path  # with a journal, which outlives the process
    dies(masked.grid, 12, lambda message: phase_of(message) == phase)
    strategy, result = masked.run(2)
    assert strategy.refused[1].keys() == {12} and "stopped responding" in strategy.refused[1][12]
    assert strategy.refused[2] == {} and not masked.unmasked()
    summed = masked_rounds.NODES
    if phase in ("keys", "shares", "values"):
        summed = [n for n in summed if n != 12]
    due = masked.moved(summed) + masked.moved()
    after = result.arrays.to_torch_state_dict()["head.weight"]
    assert float((after - masked.start["head.weight"] - due).abs().max()) < 1e-6


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_start_that_is_not_finite_is_refused_before_the_first_round(small_vit, kind, value):
    """Each client would refuse its own update, with a word on its bound that misleads."""
    federated = kind(small_vit)
    start = {n: t.clone() for n, t in federated.start.items()}
    start["head.weight"].view(-1)[0] = value
    with pytest.raises(InputError, match=r"finite starting weights of head\.weight"):
        federated.run(1, initial=ArrayRecord(start))
    assert not federated.grid.sent


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("vitguard.kept"),
        lambda state: state.__setitem__("vitguard.kept", ConfigRecord({"progress": 7})),
        lambda state: state.__setitem__("vitguard.kept", ConfigRecord({"progress": "{"})),
        lambda state: state.__setitem__(
            "vitguard.model", ArrayRecord({"a": Array(torch.zeros(3).numpy())})
        ),
    ],
    ids=["no progress", "a number", "half a text", "another model"],
)
def test_a_state_that_is_none_is_refused_in_words(small_vit, change):
    """Once a sum was opened: before that the client takes the start as the server sends it."""
    federated = Federated(small_vit)
    strategy, result = federated.run(2)
    change(federated.grid.contexts[12].state)
    federated.run(1, strategy, initial=result.arrays)
    assert strategy.refused[1].keys() == {12}
    assert "Expected" in strategy.refused[1][12].removeprefix("Expected an answer, got ")
    assert not federated.unsealed()


@BOTH
def test_weights_far_below_the_largest_are_told_in_one_line(small_vit, kind, caplog):
    """Of a value there are few levels left: within the bound of the preset, and coarse."""
    federated, nodes = kind(small_vit), NODES if kind is Federated else masked_rounds.NODES
    coarse = 1e-3 if kind is Federated else 1e-7
    for weight, told in ((8.0, False), (coarse, True)):
        federated.spoil = dict.fromkeys(nodes, weighs(weight))
        with caplog.at_level(logging.WARNING, logger="flwr"):
            caplog.clear()
            logging.getLogger("flwr").addHandler(caplog.handler)
            try:
                kind(small_vit).run(0)
                federated.run(1)
            finally:
                logging.getLogger("flwr").removeHandler(caplog.handler)
        lines = [r.getMessage() for r in caplog.records if "max_weight" in r.getMessage()]
        assert len(set(lines)) == told, lines
        federated = kind(small_vit)


@BOTH
def test_a_strategy_that_only_tells_clients_a_number_goes_with_sealed_updates(small_vit, kind):
    federated = kind(small_vit)
    own = EncryptedFedAvg if kind is Federated else MaskedFedAvg
    made = type("Proximal", (own, FedProx), {})
    keys = federated.strategy()._federation
    strategy = made(keys, proximal_mu=0.25, fraction_evaluate=0.0)
    told, send = [], federated.grid.send_and_receive

    def sending(messages, **options):
        messages = list(messages)
        told.extend(
            record["proximal-mu"]
            for m in messages
            for record in m.content.config_records.values()
            if "proximal-mu" in record
        )
        return send(messages, **options)

    federated.grid.send_and_receive = sending
    federated.run(1, strategy)
    assert strategy.refused[1] == {} and told == [0.25] * len(federated.names)


class Median(Strategy):
    """A third party's strategy around another: it reads each reply, and knows nothing of masks."""

    def __init__(self, strategy, reads=True):
        self.strategy, self.reads, self.read = strategy, reads, []

    def configure_train(self, server_round, arrays, config, grid):
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies if self.reads else []:
            (record,) = reply.content.array_records.values()
            self.read += record.to_numpy_ndarrays()
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(self, *asked):
        return self.strategy.configure_evaluate(*asked)

    def aggregate_evaluate(self, *asked):
        return self.strategy.aggregate_evaluate(*asked)

    def summary(self):
        self.strategy.summary()


def around(name, strategy):
    """Return a strategy of Flower's, or of somebody else, around one."""
    if name == "Median":
        return Median(strategy)
    settings = {"noise_multiplier": 0.1, "num_sampled_clients": 6}
    settings |= {"clipping_norm": 1.0} if "Fixed" in name else {}
    return getattr(strategies, f"DifferentialPrivacyServerSide{name}")(strategy, **settings)


@BOTH
@pytest.mark.parametrize("name", ["FixedClipping", "AdaptiveClipping", "Median"])
def test_any_strategy_around_ours_is_refused_before_anything_is_sent(small_vit, kind, name):
    """It would read sealed values as a client's update, and end the run in a traceback."""
    federated = kind(small_vit)
    strategy = federated.strategy()
    strategy.start(federated.grid, ArrayRecord(federated.start), num_rounds=0)  # not the one below
    with pytest.raises(Incompatible, match=r"FedAvg\.start, got a strategy around it"):
        around(name, strategy).start(federated.grid, ArrayRecord(federated.start), num_rounds=1)
    assert not federated.grid.sent


@pytest.mark.parametrize("name", ["FixedClipping", "AdaptiveClipping", "Median"])
def test_a_strategy_around_masks_that_reads_updates_all_the_same_reads_none(small_vit, name):
    masked = Masked(small_vit)
    send = masked.grid.send_and_receive
    masked.grid.send_and_receive = lambda *a, **o: list(send(*a, **o))  # as Flower's own grid does
    strategy = around(name, masked.strategy(wrapped=True))
    with pytest.raises(TypeError, match="nobody reads a single update"):
        strategy.start(masked.grid, ArrayRecord(masked.start), num_rounds=1)
    assert not getattr(strategy, "read", None) and not masked.unmasked()


def test_a_strategy_around_masks_that_reads_no_update_works(small_vit):
    masked = Masked(small_vit)
    strategy = Median(masked.strategy(wrapped=True), reads=False)
    result = strategy.start(masked.grid, ArrayRecord(masked.start), num_rounds=1)
    assert masked.error(result) < 1e-6
    with pytest.raises(InputError, match="wrapped"):
        masked.strategy(wrapped="yes")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("vitguard-round", -1, "round number"),
        ("vitguard-round", 2**63 - 1, "in round 1"),
        ("vitguard-round", 1.0, "a round without number"),
        ("vitguard-base", "", "another version"),
        ("vitguard-snapshot", "send", "before any round"),
        ("vitguard-weighted-by", "loss", "a claimed weight"),
    ],
)
def test_a_server_that_asks_one_client_for_nonsense_gets_nothing_of_it(
    small_vit, name, value, said
):
    federated = Federated(small_vit)
    send = federated.grid.send_and_receive

    def lying(message):
        if message.metadata.dst_node_id != 12:
            return message
        content = dict(message.content)
        content["config"] = ConfigRecord({**content["config"], name: value})
        return Message(RecordDict(content), 12, message.metadata.message_type)

    federated.grid.send_and_receive = lambda ms, **o: send([lying(m) for m in ms], **o)
    strategy, _ = federated.run(1)
    assert strategy.refused[1].keys() == {12} and said in strategy.refused[1][12]
    assert " in the app" not in strategy.refused[1][12] and not federated.unsealed()


def test_a_late_reply_beside_the_new_one_costs_nothing_but_itself(small_vit, flower_log):
    federated = Federated(small_vit)
    send, held = federated.grid.send_and_receive, []

    def late(messages, **options):
        replies = list(send(messages, **options))
        if held:
            return iter(held + replies)
        held.extend(r for r in replies if r.metadata.src_node_id == 12)
        return iter([r for r in replies if r.metadata.src_node_id != 12])

    federated.grid.send_and_receive = late
    strategy, _ = federated.run(3)
    assert not strategy.refused[2]  # its new one is in the sum
    assert any("node 12" in line and "round 1 in round 2" in line for line in flower_log())
    federated.check(federated.seen[13][-1], [n for n in NODES if n != 12], NODES)


def replayed(federated, node):
    """Run a round; then let one node say what it said in it, in another run of all others."""
    said, app = [], federated.grid.apps[node]

    def recorded(message, context):
        said.append(app(message, context))
        return said[-1]

    federated.grid.apps[node] = recorded
    federated.run(1)
    replies = iter(said)
    federated.grid.apps[node] = lambda message, context: Message(
        content=next(replies).content, reply_to=message
    )
    for context in federated.grid.contexts.values():
        context.state = RecordDict()
    return federated.run(1)


def test_what_a_client_said_in_another_run_counts_for_nothing(small_vit):
    """The same keys, round, model and client: only the run is another."""
    federated = Federated(small_vit)
    strategy, result = replayed(federated, 12)
    assert list(strategy.refused[1]) == [12] and "another version" in strategy.refused[1][12]
    federated.run(1, initial=result.arrays)
    federated.check(federated.seen[13][-1], [n for n in NODES if n != 12])


def test_what_a_client_said_in_another_run_under_masks_costs_no_round(small_vit):
    masked = Masked(small_vit)
    strategy, result = replayed(masked, 12)
    assert list(strategy.refused[1]) == [12] and "round" in strategy.refused[1][12]
    assert masked.error(result, [n for n in masked_rounds.NODES if n != 12]) < 1e-6


@BOTH
def test_a_run_that_begins_again_in_its_first_round_is_a_new_one(small_vit, kind):
    """A server that fell before the first sum: the clients, which opened none, take part."""
    federated = kind(small_vit)
    federated.grid.late = set(federated.names)
    if kind is Masked:
        federated.silent = {"values": federated.names}
    federated.run(1)
    federated.grid.late, federated.silent = set(), {}
    strategy, _ = federated.run(
        1, federated.strategy(**({"first_round": 2} if kind is Masked else {}))
    )
    assert strategy.refused[1] == {}


def test_a_start_without_the_name_of_its_run_is_trained_by_nobody(small_vit):
    federated = Federated(small_vit)
    send = federated.grid.send_and_receive

    def nameless(message):
        content = dict(message.content)
        arrays = {n: a for n, a in content["arrays"].items() if n != RUN}
        content["arrays"] = ArrayRecord(arrays)
        return Message(RecordDict(content), message.metadata.dst_node_id, "train")

    federated.grid.send_and_receive = lambda ms, **o: send([nameless(m) for m in ms], **o)
    strategy, _ = federated.run(1)
    assert all("the name of its run" in said for said in strategy.refused[1].values())
    assert strategy.refused[1].keys() == set(NODES) and not federated.seen


@pytest.mark.parametrize("change", [0, 1j])
def test_a_complex_buffer_that_changed_is_refused_not_lost(small_vit, change):
    """No defense takes complex values: what a client made of them would stay behind in silence."""

    def turning():
        model = plain(small_vit)
        model.register_buffer("turns", torch.ones(3, dtype=torch.complex64))
        return model

    def changed(node, state):
        return added(node, state) | {"turns": state["turns"] + change}

    nodes = Nodes(turning, change=changed)
    after = nodes.run(turning().state_dict(), rounds=1)
    assert (after is None) == bool(change)
    assert all("turns unchanged" in reason for reason in nodes.reasons)


@BOTH
def test_a_clock_that_jumps_ends_no_round(small_vit, kind, monkeypatch):
    from vitguard.federated.flower import grid

    times = iter(range(2_000_000_000, 0, -10_000_000))
    monkeypatch.setattr(grid.time, "time", lambda: float(next(times)))
    strategy, _ = kind(small_vit).run(2)
    assert strategy.refused == {1: {}, 2: {}}


@pytest.mark.parametrize(
    "name", ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "FedMedian", "FedTrimmedAvg", "Bulyan"]
)
def test_counters_and_positions_survive_stock_strategies(small_vit, name):
    """They turn counters into fractions; clients take these in, and fixed positions stay."""
    nodes = Nodes(lambda: normed(small_vit), "positions:kind=frozen")
    start = normed(small_vit).state_dict()
    made = getattr(strategies, name)(fraction_evaluate=0.0)
    result = made.start(nodes.grid, ArrayRecord(start), num_rounds=2)
    after = result.arrays.to_torch_state_dict()
    assert all(bool(t.isfinite().all()) for t in after.values())
    assert nodes.trained == 6 and after["head.0.num_batches_tracked"].shape == ()


def test_an_encrypted_run_without_a_round_ends_at_the_weights_it_began_with(small_vit):
    """As a template reads them in its last line; sealed sums are read by clients alone."""
    federated = Federated(small_vit)
    federated.grid.late = set(NODES)
    _, result = federated.run(1)
    after = result.arrays.to_torch_state_dict()
    assert all(torch.equal(after[n], t) for n, t in federated.start.items())
    federated.grid.late = set()
    _, result = federated.run(1)
    with pytest.raises(TypeError, match="encrypted, clients alone read the sum"):
        result.arrays.to_torch_state_dict()


LINES = "a\n\x1b[31mRound 9: node 13 refused\u2028" + 3000 * "b"


@BOTH
@pytest.mark.parametrize("where", ["reason", "name of an array", "name of a metric"])
def test_what_a_client_says_is_one_short_line_of_the_servers_log(
    small_vit, kind, where, flower_log
):
    """Or it could write lines there that look like those of others."""
    federated = kind(small_vit)
    app = federated.grid.apps[12]

    def saying(message, context):
        reply = app(message, context)
        if where == "reason":
            return Message(Error(1, LINES), reply_to=message)
        if reply.has_error() or not reply.content.array_records:
            return reply
        ((name, arrays),) = reply.content.array_records.items()
        content = RecordDict(dict(reply.content))
        if where == "name of an array":
            content[name] = ArrayRecord({**arrays, LINES: Array("x", (), "pickle", b"")})
        return Message(content, reply_to=message)

    federated.grid.apps[12] = saying
    if where == "name of a metric":
        odd = {LINES: float("nan")}
        federated.spoil = dict.fromkeys(federated.names, lambda s, m: (s, m | odd))
    strategy, _ = federated.run(1)
    assert strategy.refused[1].keys() == ({12} if where != "name of a metric" else set())
    lines = flower_log()
    assert any("Round 9" in line for line in lines)
    for line in (*lines, *strategy.refused[1].values()):
        assert len(line) < 900 and line.isprintable(), line[:300]
