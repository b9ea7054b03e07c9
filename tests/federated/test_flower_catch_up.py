"""What a server keeps does not grow: not with the rounds, and not with the clients."""

import weakref

import pytest
import torch

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import strategy_utils

from tests.federated.flower_rounds import NODES, Federated, raises
from tests.federated.test_flower_faults import before_each_round
from vitguard.defenses.encryption import KeySet, Manifest, SigningKey
from vitguard.errors import InputError, Rejected
from vitguard.federated.flower import EncryptedFedAvg, InProcessGrid, snapshots
from vitguard.federated.flower.arrivals import Arrivals
from vitguard.federated.flower.records import History, sealed_array
from vitguard.federated.flower.server import Vouched
from vitguard.federated.flower.snapshots import Snapshot, vouch


@pytest.fixture
def federated(small_vit):
    return Federated(small_vit)


@pytest.fixture
def first(monkeypatch):
    """Let one node be the first that is asked in every round."""

    def choose(node):
        monkeypatch.setattr(
            strategy_utils.random,
            "sample",
            lambda nodes, size: sorted(nodes, key=lambda n: n != node)[:size],
        )

    return choose


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def sizes(federated):
    """Bytes of the messages to node 11, round by round."""
    return [len(b) for b in federated.grid.sent[::2]]


@pytest.mark.slow
def test_no_more_sums_are_kept_than_the_limit_however_many_rounds(federated):
    strategy, kept = federated.strategy(catch_up=2), []
    before_each_round(federated, lambda _: kept.append(len(strategy._history.steps)))
    _, result = federated.run(9, strategy)
    assert kept == [0, 1, 2, 1, 2, 1, 2, 1, 2] and not any(strategy.refused.values())
    history = History.of(result.arrays)
    assert len(history.steps) == 1 and history.snapshot.number == 8
    federated.check(federated.seen[11][-1], *8 * [NODES])


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [3, 8])
def test_a_new_node_and_one_that_lost_its_state_get_one_model_and_few_sums(federated, rounds):
    federated.grid.absent = {12}
    _, result = federated.run(rounds, federated.strategy(catch_up=2))
    federated.grid.absent, federated.grid.sent = set(), []
    federated.grid.contexts[13].state = RecordDict()
    strategy, _ = federated.run(1, initial=result.arrays)
    assert strategy.refused == {1: {}}
    for node in (12, 13):
        assert equal(federated.seen[node][-1], federated.seen[11][-1])
    others = [n for n in NODES if n != 12]
    federated.check(federated.seen[12][-1], *rounds * [others])
    plain = sum(t.numel() * 4 for t in federated.start.values())
    a_sum = len(History.of(result.arrays).steps[-1].total)
    assert max(sizes(federated)) < plain + 2 * a_sum + 20_000


@pytest.mark.slow
def test_a_node_that_sat_out_more_rounds_than_are_kept_comes_back(federated):
    strategy = federated.strategy(catch_up=1)

    def act(number):
        federated.grid.late = {12} if 2 <= number <= 6 else set()

    before_each_round(federated, act)
    federated.run(7, strategy)
    assert not any(strategy.refused.values())
    assert equal(federated.seen[12][-1], federated.seen[11][-1])


@pytest.mark.slow
def test_a_server_that_restarts_after_a_model_was_sealed_goes_on(federated):
    saved = ArrayRecord(federated.start)
    for _ in range(6):
        strategy, result = federated.run(1, strategy=federated.strategy(catch_up=1), initial=saved)
        assert strategy.refused == {1: {}}
        saved = result.arrays
    federated.check(federated.seen[13][-1], *5 * [NODES])
    assert History.of(saved).last_round == 6


@pytest.mark.slow
def test_the_server_cannot_read_the_model_that_it_keeps(federated):
    federated.run(5, strategy=federated.strategy(catch_up=1))
    everything = b"".join(federated.grid.sent)
    models = [
        t.numpy().tobytes()
        for weights in federated.seen[11][1:]
        for k, t in weights.items()
        if k != "pos_embed" and t.numel() >= 8
    ]
    assert len(models) > 20 and not any(m[:32] in everything for m in models)
    assert b"vitguard.snapshot.1" in everything and not federated.unsealed()


@pytest.mark.slow
def test_a_client_that_fails_when_it_is_asked_costs_one_round_more(federated, first):
    strategy = federated.strategy(catch_up=1)

    def act(number):
        first(12 if number == 2 else 11)
        federated.spoil = {12: raises} if number == 2 else {}

    before_each_round(federated, act)
    _, result = federated.run(3, strategy)
    assert list(strategy.refused[2]) == [12] and strategy.refused[3] == {}
    assert History.of(result.arrays).snapshot.number == 2


@pytest.mark.slow
def test_a_model_that_others_do_not_vouch_for_is_not_kept(federated, first):
    first(12)

    def act(number):
        if number == 2:  # one bit of one weight, on its disk
            state = federated.grid.contexts[12].state
            weights = state["vitguard.model"].to_torch_state_dict()
            weights["head.bias"][0] += 1e-3
            state["vitguard.model"] = ArrayRecord(weights)

    before_each_round(federated, act)
    _, result = federated.run(2, federated.strategy(catch_up=1))
    history = History.of(result.arrays)
    assert history.snapshot is None and len(history.steps) == 2


@pytest.mark.parametrize(("votes", "taken"), [(1, False), (2, False), (3, True), (4, True)])
def test_a_sealed_model_is_taken_where_more_than_half_vouch_for_its_weights(sealed, votes, taken):
    snapshot = sealed[3]
    said = Vouched(snapshot.number, snapshot.version)
    said.add(snapshot.proof, snapshot)
    for client in range(1, 4):
        said.add(snapshot.proof if client < votes else bytes(32), None)
    assert said.agreed() is (snapshot if taken else None)


def replying(federated, node, change):
    """Let a node change the arrays of its replies."""
    app = federated.app(node)

    def changed(message, context):
        reply = app(message, context)
        if not reply.has_error():
            (name,) = reply.content.array_records
            reply.content[name] = ArrayRecord(change(dict(reply.content[name])))
        return reply

    federated.grid.apps[node] = changed


def only(arrays):
    return next(n for n in arrays if n.startswith("vitguard.snapshot"))


BROKEN = {
    "none": lambda a: {n: x for n, x in a.items() if not n.startswith("vitguard.snapshot")},
    "of another round": lambda a: {n.replace("shot.1", "shot.7"): x for n, x in a.items()},
    "without a vouch": lambda a: {n: x for n, x in a.items() if n != "vitguard.vouch"},
}
REFUSED = {
    "short": lambda a: {**a, only(a): sealed_array(b"abc")},
    "several": lambda a: {**a, "vitguard.snapshot.5": a[only(a)]},
    "in plain": lambda a: {**a, only(a): ArrayRecord({"x": torch.ones(300)})["x"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*BROKEN, *REFUSED])
def test_a_sealed_model_that_is_none_is_not_kept(federated, first, fault):
    first(12)
    strategy = federated.strategy(catch_up=1)
    change = (BROKEN | REFUSED)[fault]

    def act(number):
        if number == 2:
            replying(federated, 12, change)

    before_each_round(federated, act)
    _, result = federated.run(2, strategy)
    assert History.of(result.arrays).snapshot is None or fault == "without a vouch"
    assert list(strategy.refused[2]) == ([12] if fault in REFUSED else [])
    federated.grid.apps[12] = federated.app(12)
    strategy, _ = federated.run(1, initial=result.arrays)
    assert all("12" not in r for r in strategy.refused[1].values())
    federated.check(federated.seen[11][-1], NODES, NODES if fault in BROKEN else (11, 13, 14))


@pytest.mark.slow
def test_a_sealed_model_of_a_node_that_was_not_asked_is_refused(federated, first):
    """Whoever has the keys could put another in its place, which later nodes could not open."""
    first(12)
    strategy, taken = federated.strategy(catch_up=1), []

    def act(number):
        if number == 2:
            replying(federated, 12, lambda a: taken.append((only(a), a[only(a)])) or a)
            replying(federated, 13, lambda a: {**a, taken[0][0]: taken[0][1]})

    before_each_round(federated, act)
    _, result = federated.run(2, strategy)
    assert list(strategy.refused[2]) == [13] and "not asked" in strategy.refused[2][13]
    assert History.of(result.arrays).snapshot is not None


@pytest.fixture(scope="module")
def sealed():
    keys = KeySet.generate(server=SigningKey.generate().public_bytes())
    weights = {"w": torch.arange(9.0), "n": torch.tensor(3)}
    manifest = Manifest.of(weights, bounds=1.0)
    return keys, manifest, weights, Snapshot.of(keys, manifest, 4, 64 * "a", weights)


def test_a_sealed_model_is_opened_by_every_client_of_the_run_and_by_no_other(sealed):
    keys, manifest, weights, snapshot = sealed
    read = Snapshot.from_bytes(4, snapshot.to_bytes())
    assert equal(read.open(keys.for_client("b"), manifest), weights)
    with pytest.raises(Rejected, match="another key"):
        read.open(KeySet.generate(), manifest)
    with pytest.raises(Rejected, match="another run"):
        read.open(keys, manifest.new_run())
    with pytest.raises(Rejected, match="another run"):
        Snapshot.from_bytes(5, snapshot.to_bytes()).open(keys, manifest)
    assert not hasattr(keys.for_server(), "derived")


def test_a_sealed_model_with_one_changed_bit_is_refused(sealed):
    keys, manifest, _, snapshot = sealed
    whole = snapshot.to_bytes()
    for place in (0, 63, 64, 95, 96, 107, 108, 150, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        with pytest.raises(Rejected):
            Snapshot.from_bytes(4, bytes(changed)).open(keys, manifest)


def test_a_client_that_seals_another_model_than_it_vouches_for_is_found_out(sealed, monkeypatch):
    keys, manifest, weights, snapshot = sealed
    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "vouch", lambda *facts: snapshot.proof)
        other = {**weights, "w": weights["w"] + 1}
        lying = Snapshot.of(keys, manifest, 4, 64 * "a", other)
    with pytest.raises(Rejected, match="did not vouch"):
        lying.open(keys, manifest)


def test_clients_vouch_alike_for_the_same_weights_and_the_server_cannot_guess_them(sealed):
    keys, manifest, weights, snapshot = sealed
    assert vouch(keys.for_client("x"), manifest, 4, 64 * "a", weights) == snapshot.proof
    others = [
        vouch(KeySet.generate(), manifest, 4, 64 * "a", weights),
        vouch(keys, manifest, 5, 64 * "a", weights),
        vouch(keys, manifest, 4, 64 * "b", weights),
        vouch(keys, manifest, 4, 64 * "a", {**weights, "n": torch.tensor(4)}),
    ]
    assert snapshot.proof not in others


@pytest.mark.parametrize("catch_up", [0, -1, 1.5, True, None])
def test_a_limit_that_is_none_is_refused(federated, catch_up):
    with pytest.raises(InputError, match="catch_up"):
        federated.strategy(catch_up=catch_up)


class Watching:
    """Counts the replies that are there at once."""

    def __init__(self):
        self.alive, self.most, self.total = weakref.WeakSet(), 0, 0

    def __call__(self, replies):
        for reply in replies:
            self.alive.add(reply)
            self.total += 1
            self.most = max(self.most, len(self.alive))
            yield reply
            del reply


class Posted(Grid):
    """A grid as Flower's own is: messages are pushed, and replies are there some turns later."""

    def __init__(self, inner, *, slow=(), never=()):
        self.inner, self.slow, self.never = inner, set(slow), set(never)
        self.box, self.pushed, self.asked = {}, [], []

    set_run = create_message = send_and_receive = lambda self, *a, **k: pytest.fail("not used")
    run = property(lambda self: None)

    def get_node_ids(self):
        return self.inner.get_node_ids()

    def push_messages(self, messages):
        names = []
        for message in messages:
            names.append(str(len(self.pushed)))
            self.pushed.append(message.metadata.dst_node_id)
            self.box[names[-1]] = message
        return names

    def pull_messages(self, message_ids):
        for name in message_ids:
            node = self.box[name].metadata.dst_node_id if name in self.box else None
            self.asked.append(node)
            if node in self.slow:
                self.slow.discard(node)
            elif node is not None and node not in self.never:
                return list(self.inner.send_and_receive([self.box.pop(name)]))
        return []


@pytest.mark.slow
@pytest.mark.parametrize("posted", [False, True], ids=["in one process", "as Flower's own"])
def test_replies_are_added_as_they_arrive_and_none_is_kept(federated, posted, monkeypatch):
    grid, watching = federated.grid, Watching()
    grid.apps = {n: federated.app(NODES[n % 4]) for n in range(100, 112)}  # some count twice
    grid.contexts = InProcessGrid(grid.apps).contexts
    strategy, aggregate = federated.strategy(), EncryptedFedAvg.aggregate_train
    monkeypatch.setattr(
        EncryptedFedAvg,
        "aggregate_train",
        lambda self, number, replies: aggregate(self, number, watching(replies)),
    )
    outer = Posted(grid, slow=[101, 105]) if posted else grid
    strategy.start(outer, ArrayRecord(federated.start), num_rounds=2)
    assert watching.total == 24 and watching.most <= 2
    assert all(len(refused) == 8 for refused in strategy.refused.values())


def test_replies_that_are_late_are_asked_for_again_and_end_with_the_time(federated):
    waits = []
    grid = Posted(federated.grid, slow=[11, 12], never=[13])
    arriving = Arrivals(grid, wait=lambda: waits.append(len(grid.asked)))
    strategy = federated.strategy()
    strategy._history, strategy._started = History(federated.start, run=bytes(16)), True
    messages = strategy.configure_train(1, ArrayRecord(federated.start), ConfigRecord(), arriving)
    replies = arriving.send_and_receive(messages, timeout=None)
    assert grid.pushed and not grid.asked  # sent at once, asked for when they are taken
    came = [next(replies).metadata.src_node_id for _ in range(3)]
    assert sorted(came) == [11, 12, 14] and not waits
    grid.never.clear()
    assert [r.metadata.src_node_id for r in replies] == [13]
    grid.never = {11, 12, 13, 14}
    messages = strategy.configure_train(1, ArrayRecord(federated.start), ConfigRecord(), arriving)
    assert list(arriving.send_and_receive(messages, timeout=0)) == []


def test_a_reply_that_a_grid_hands_out_twice_arrives_once(federated):
    grid = Posted(federated.grid)
    pull, strategy = grid.pull_messages, federated.strategy()
    grid.pull_messages = lambda names: 2 * pull(names)
    _, result = federated.run(1, strategy, grid=grid)
    assert strategy.refused == {1: {}} and len(History.of(result.arrays).steps) == 1


def test_messages_of_a_round_share_what_they_carry(federated):
    strategy = federated.strategy()
    strategy._history, strategy._started = History(federated.start, run=bytes(16)), True
    messages = strategy.configure_train(
        1, ArrayRecord(federated.start), ConfigRecord(), federated.grid
    )
    assert len({id(m.content["arrays"]) for m in messages}) == 1
