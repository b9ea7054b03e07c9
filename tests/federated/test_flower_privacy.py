"""Privacy over rounds of Flower: what is counted is what was released, whatever restarts."""

import pytest
import torch

pytest.importorskip("flwr", reason="needs vitguard[flower]")

pytest.importorskip("dp_accounting")

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.serde import make_message
from flwr.serverapp.strategy import FedAvg

import vitguard as vg
from tests.federated.flower_rounds import NODES, Federated, tiny
from tests.federated.masked_rounds import Masked
from tests.federated.test_flower_faults import before_each_round, through_bytes
from vitguard.errors import InputError, Unprotected
from vitguard.federated.flower import InProcessGrid, LedgerGrid, Ledgers, ProtectMod, attach
from vitguard.federated.flower.arrivals import Arrivals

ROUNDS = 50
RECORDS, BATCH = 12, 4


def app(small_vit, defense, counts=None, late=False):
    """Train as the defense wants it; `counts` collects the steps of each message.

    A late one attaches after the training.
    """
    app = ClientApp(mods=[ProtectMod()])

    @app.train()
    def train(message, context):
        model = tiny(small_vit)
        guard = vg.protect(model, [defense])
        if not late:
            attach(guard)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        if isinstance(defense, vg.DifferentialPrivacy):
            images, labels = torch.rand(RECORDS, 3, 8, 8), torch.arange(RECORDS) % 2
            loader = torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(images, labels), batch_size=BATCH
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer, loader = guard.prepare(optimizer, loader)
            for x, y in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                if counts is not None:
                    counts.append(1)
        if late:
            attach(guard)
        state = {k: t.clone() for k, t in model.state_dict().items()}
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
        return Message(content=content, reply_to=message)

    return app


class Rounds:
    """Two nodes under a stock strategy and a LedgerGrid; both restart before every round."""

    def __init__(self, small_vit, defense, nodes=NODES[:2]):
        self.defense, self.small_vit, self.counts = defense, small_vit, []
        self.start = ArrayRecord(tiny(small_vit).state_dict())
        self.grid = InProcessGrid({n: None for n in nodes})
        self.replies = []
        self.counting = LedgerGrid(self.grid)
        self.restart()

    def restart(self):
        for node in self.grid.apps:
            self.grid.contexts[node] = through_bytes(self.grid.contexts[node])
            self.grid.apps[node] = app(self.small_vit, self.defense, self.counts)

    def run(self, rounds=1, grid=None):
        strategy = FedAvg(fraction_evaluate=0.0)
        inner = strategy.aggregate_train

        def aggregate(number, replies):
            self.restart()
            self.replies.append(list(replies))
            return inner(number, self.replies[-1])

        strategy.aggregate_train = aggregate
        return strategy.start(grid or self.counting, self.start, num_rounds=rounds)

    def errors(self):
        return [r.error.reason for r in self.replies[-1] if r.has_error()]


def epsilon(noise, steps, delta, rate=1.0):
    event = GaussianDpEvent(noise)
    if rate < 1:
        event = PoissonSampledDpEvent(rate, event)
    accountant = PLDAccountant().compose(SelfComposedDpEvent(event, steps))
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize("total", [3, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_rounds_of_client_privacy_are_the_closed_accounting_over_restarts(small_vit, total):
    defense = vg.ClientPrivacy(epsilon=8.0, rounds=total)
    rounds = Rounds(small_vit, defense)
    result = rounds.run(total)
    said = [m["epsilon"] for _, m in sorted(result.train_metrics_clientapp.items())]
    assert len(said) == total and said == sorted(said)
    noise = defense.multiplier
    for number in {1, min(10, total), total}:
        assert said[number - 1] == pytest.approx(epsilon(noise, number, defense.delta), rel=0.02)
    assert said[-1] <= 8.0
    rounds.run(1)
    assert len(rounds.errors()) == 2  # the target is used up


@pytest.mark.slow
def test_fifty_rounds_of_record_privacy_are_the_closed_accounting_over_restarts(small_vit):
    defense = vg.DifferentialPrivacy(noise=2.0, delta=1e-3)
    rounds = Rounds(small_vit, defense)
    result = rounds.run(ROUNDS)
    said = [m["epsilon"] for _, m in sorted(result.train_metrics_clientapp.items())]
    steps = RECORDS // BATCH
    assert len(rounds.counts) == 2 * ROUNDS * steps
    for number in (1, 10, ROUNDS):
        closed = epsilon(2.0, number * steps, 1e-3, BATCH / RECORDS)
        assert said[number - 1] == pytest.approx(closed, rel=0.02)
    one = epsilon(2.0, steps, 1e-3, BATCH / RECORDS)
    assert said[-1] > 3 * one  # an accountant that starts afresh each round would say `one`


@pytest.fixture
def rounds(small_vit):
    return Rounds(small_vit, vg.ClientPrivacy(epsilon=8.0, rounds=10))


def test_a_state_that_was_set_back_is_refused_before_it_trains(rounds):
    rounds.run(2)
    old = through_bytes(rounds.grid.contexts[11])
    rounds.run(2)
    rounds.grid.contexts[11] = old
    rounds.run(1)
    (reason,) = rounds.errors()
    assert "counted 4 releases, got one of 2" in reason
    assert rounds.counting.ledgers.most.keys() == set(rounds.counting.ledgers.nodes.values())


def test_a_state_that_was_lost_is_refused(rounds):
    rounds.run(2)
    rounds.grid.contexts[11].state = RecordDict()
    rounds.run(1)
    (reason,) = rounds.errors()
    assert "lost or set back" in reason


def test_a_state_that_is_put_back_in_time_goes_on(rounds):
    rounds.run(2)
    newest = through_bytes(rounds.grid.contexts[11])
    rounds.grid.contexts[11].state = RecordDict()
    rounds.run(1)
    rounds.grid.contexts[11] = newest
    rounds.run(1)
    assert rounds.errors() == []


def test_two_nodes_that_go_on_from_one_copy_are_noticed(rounds):
    rounds.run(2)
    copy = through_bytes(rounds.grid.contexts[11])
    rounds.grid.apps[15] = rounds.grid.apps[11]
    rounds.grid.contexts[15] = copy
    rounds.run(1)
    (reason,) = rounds.errors()  # whichever came second
    assert "release 3 after release 3" in reason


def test_a_ledger_that_two_nodes_went_on_from_is_refused_from_then_on(rounds):
    """Either goes on counting for itself: what both count is less than what was released."""
    rounds.run(2)
    rounds.grid.contexts[15] = through_bytes(rounds.grid.contexts[11])
    rounds.grid.apps[15] = rounds.grid.apps[11]
    rounds.run(1)
    saved = Ledgers.from_json(rounds.counting.ledgers.to_json())
    assert saved == rounds.counting.ledgers
    rounds.run(1, LedgerGrid(rounds.grid, saved))
    assert len(rounds.errors()) == 2 and all("two nodes" in r for r in rounds.errors())


def test_a_server_without_the_reminder_still_refuses_what_went_back(rounds):
    """The client cannot know then; the reply is kept out of the average."""
    rounds.run(1)
    old = through_bytes(rounds.grid.contexts[11])
    rounds.run(1)
    rounds.grid.contexts[11] = old
    rounds.counting.ledgers.known = lambda node: None
    rounds.run(1)
    (reason,) = rounds.errors()
    assert "release 2 after release 2" in reason


def test_a_server_that_restarts_remembers_the_ledgers_that_it_saved(rounds):
    rounds.run(2)
    saved = rounds.counting.ledgers.to_json()
    rounds.grid.contexts[11].state = RecordDict()
    rounds.run(1, LedgerGrid(rounds.grid, Ledgers.from_json(saved)))
    assert len(rounds.errors()) == 1
    rounds.run(1, LedgerGrid(rounds.grid))  # one that remembers nothing notices nothing
    assert rounds.errors() == []


def test_a_ledger_that_went_back_is_refused_under_encryption_also_by_a_server_that_restarted(
    small_vit,
):
    federated = Federated(small_vit, private=[vg.ClientPrivacy(noise=1.0)])
    federated.outliers, federated.grid.absent = dict.fromkeys(NODES, "clip"), {13, 14}
    strategy, result = federated.run(1)
    assert strategy.refused[1] == {} and set(strategy.ledgers.most.values()) == {1}
    federated.grid.contexts[12].state = RecordDict()
    again = federated.strategy()
    again.ledgers = Ledgers.from_json(strategy.ledgers.to_json())
    federated.run(1, again, result.arrays)
    assert list(again.refused[1]) == [12] and "set back" in again.refused[1][12]


@pytest.mark.parametrize("between", [lambda grid: grid, Arrivals])
def test_a_grid_counts_ledgers_once(between):
    """Counted a second time, no ledger would have grown, and every reply were refused."""
    counting = LedgerGrid(InProcessGrid({}))
    with pytest.raises(InputError, match="one LedgerGrid, got one around another"):
        LedgerGrid(between(counting), counting.ledgers)


@pytest.mark.parametrize("kind", [Federated, Masked])
def test_ledgers_of_a_grid_around_are_those_of_a_strategy_that_counts_by_itself(small_vit, kind):
    """What a server that restarted gives to `LedgerGrid` was counted by nobody."""
    federated = kind(small_vit, private=[vg.ClientPrivacy(noise=1.0)], select="head")
    federated.outliers = "clip" if kind is Masked else dict.fromkeys(NODES, "clip")
    before = Ledgers({"0" * 32: 7}, {NODES[1]: "0" * 32})
    strategy = federated.strategy()
    around = LedgerGrid(federated.grid, Ledgers.from_json(before.to_json()))
    strategy.start(around, ArrayRecord(federated.start), num_rounds=1)
    assert list(strategy.refused[1]) == [NODES[1]] and "7 releases" in strategy.refused[1][NODES[1]]
    assert strategy.ledgers is around.ledgers and len(around.ledgers.nodes) == len(federated.names)


@pytest.mark.parametrize(
    "told",
    [
        None,
        {"name": "x" * 32, "releases": 9},
        {"name": "", "releases": 9},
        {"name": "x" * 65, "releases": 9},
        {"name": 3, "releases": 9},
        {"releases": 9},
        {"name": "known"},
        {"name": "known", "releases": "9"},
        {"name": "known", "releases": True},
        {"name": "known", "releases": 3},
        {"name": "known", "releases": -1},
        {"name": "known", "releases": 9.0},
    ],
)
def test_a_ledger_that_tells_nonsense_is_refused(told):
    ledgers = Ledgers({"known": 3}, {11: "known"})
    with pytest.raises(InputError):
        ledgers.count(11, None if told is None else ConfigRecord(told))
    assert ledgers == Ledgers({"known": 3}, {11: "known"})
    ledgers.count(11, ConfigRecord({"name": "known", "releases": 4}))
    assert ledgers.most == {"known": 4}


@pytest.mark.parametrize("releases", [0, -1, -(2**63)])
def test_a_new_ledger_that_counted_nothing_costs_its_own_reply(small_vit, releases):
    """One client's reply must not end the run of all."""
    federated = Federated(small_vit)
    app = federated.grid.apps[12]

    def telling(message, context):
        content = RecordDict(dict(app(message, context).content))
        content["vitguard.ledger"] = ConfigRecord({"name": "new", "releases": releases})
        return Message(content, reply_to=message)

    federated.grid.apps[12] = telling
    strategy, _ = federated.run(1)
    assert strategy.refused[1].keys() == {12} and not strategy.ledgers.most
    assert f"release {releases} after release 0" in strategy.refused[1][12]


def test_an_update_in_a_reply_of_another_type_is_counted_too(small_vit):
    """What was released does not depend on the name that a client gives to its reply."""
    private = (vg.ClientPrivacy(noise=1e-6, clip=1.0, rounds=5),)
    federated = Federated(small_vit, private=private)
    send = federated.grid.send_and_receive

    def renamed(reply):
        about = reply.metadata
        other = Metadata(1, "1", 12, 1, "", "", about.created_at, about.ttl, "evaluate")
        return make_message(other, reply.content)

    def sending(messages, **options):
        replies = send(messages, **options)
        return (renamed(r) if r.metadata.src_node_id == 12 else r for r in replies)

    federated.grid.send_and_receive = sending
    strategy, _ = federated.run(1)
    assert strategy.ledgers.most[strategy.ledgers.nodes[12]] == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "{}",
        '{"most": {}, "nodes": {}, "copied": [3]}',
        '{"most": {}, "nodes": {"1": "a"}}',
        '{"most": {"a": "x"}, "nodes": {}}',
        '{"most": {"a": 3}, "nodes": {"1": "a"}}',  # which node was copied is not said
        '{"most": {"a": 2.9}, "nodes": {"1": "a"}, "copied": []}',
        '{"most": {"a": true}, "nodes": {"1": "a"}, "copied": []}',
        '{"most": {"a": -1}, "nodes": {"1": "a"}, "copied": []}',
        '{"most": {"a": 3}, "nodes": {"01": "a"}, "copied": []}',
        '{"most": {"a": 3}, "nodes": {"1": "a"}, "copied": ""}',
        '{"most": {"a": 3}, "nodes": {"1": "a"}, "copied": [], "more": 1}',
    ],
)
def test_ledgers_that_were_not_saved_here_are_refused(text):
    with pytest.raises(InputError):
        Ledgers.from_json(text)


def test_a_stack_without_a_privacy_ledger_may_lose_its_state(small_vit):
    rounds = Rounds(small_vit, vg.GradientNoise())
    rounds.run(1)
    rounds.grid.contexts[11].state = RecordDict()
    rounds.run(1)
    assert rounds.errors() == [] and rounds.counting.ledgers == Ledgers()


def test_a_message_that_was_lost_stays_counted(rounds):
    rounds.run(1)
    before_each_round(rounds, lambda _: rounds.grid.late.add(11))
    rounds.run(1)
    rounds.grid.late.clear()
    rounds.grid.send_and_receive = type(rounds.grid).send_and_receive.__get__(rounds.grid)
    result = rounds.run(1)
    assert rounds.errors() == []
    assert result.train_metrics_clientapp[1]["epsilon"] > 0


@pytest.mark.slow
def test_a_ledger_that_is_joined_after_training_lets_nothing_leave_past_the_target(small_vit):
    """A loop that loads its state too late has trained without the rounds in it."""
    guards = []
    for _ in range(2):
        model = tiny(small_vit)
        guards.append(vg.protect(model, [vg.DifferentialPrivacy(epsilon=8, delta=1e-3, epochs=1)]))
        pairs = torch.utils.data.TensorDataset(torch.rand(4, 3, 8, 8), torch.arange(4) % 2)
        loader = torch.utils.data.DataLoader(pairs, batch_size=2)
        optimizer, loader = guards[-1].prepare(torch.optim.SGD(model.parameters(), lr=0.1), loader)
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    first, late = guards
    changes = {n: torch.ones_like(p) for n, p in late.model.named_parameters()}
    update = vg.Update(changes, kind="difference")
    assert late.seal(update).tensors
    late.load_state_bytes(first.state_bytes())
    with pytest.raises(Unprotected, match="those of earlier rounds"):
        late.seal(update)


def test_a_guard_that_is_attached_after_private_training_lets_nothing_leave(small_vit):
    """Its ledger was not there to refuse the steps that go past the target."""
    defense = vg.DifferentialPrivacy(epsilon=8, delta=1e-3, epochs=1)
    grid = InProcessGrid(dict.fromkeys(NODES[:2], app(small_vit, defense, late=True)))
    start = ArrayRecord(tiny(small_vit).state_dict())
    messages = [Message(RecordDict({"arrays": start}), node, "train") for node in NODES[:2]]
    replies = list(grid.send_and_receive(messages))
    assert len(replies) == 2 and all("before training" in r.error.reason for r in replies)


@pytest.mark.parametrize("steps", ["private", "plain"])
def test_each_update_of_a_stack_with_private_steps_needs_some_of_its_own(small_vit, steps):
    """The ledger of earlier rounds says nothing of a loop that went around `prepare`."""
    defense = vg.DifferentialPrivacy(noise=2.0, delta=1e-3)
    rounds = Rounds(small_vit, defense)
    assert rounds.run(1).train_metrics_clientapp[1]["epsilon"] > 0
    if steps == "plain":
        rounds.grid.apps = dict.fromkeys(rounds.grid.apps, around(small_vit, defense))
    result = FedAvg(fraction_evaluate=0.0).start(rounds.grid, rounds.start, num_rounds=1)
    assert bool(result.train_metrics_clientapp) == (steps == "private")


def around(small_vit, defense):
    """An app that prepares, and trains a copy of its own."""
    app = ClientApp(mods=[ProtectMod()])

    @app.train()
    def train(message, context):
        model, other = tiny(small_vit), tiny(small_vit)
        guard = attach(vg.protect(model, [defense]))
        for one in (model, other):
            one.load_state_dict(message.content["arrays"].to_torch_state_dict())
        pairs = torch.utils.data.TensorDataset(torch.rand(4, 3, 8, 8), torch.arange(4) % 2)
        loader = torch.utils.data.DataLoader(pairs, batch_size=2)
        guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1), loader)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        torch.nn.functional.cross_entropy(other(pairs.tensors[0]), pairs.tensors[1]).backward()
        optimizer.step()
        metrics = MetricRecord({"num-examples": 1})
        content = {"arrays": ArrayRecord(other.state_dict()), "metrics": metrics}
        return Message(content=RecordDict(content), reply_to=message)

    return app
