"""Answers that come late, twice or never, beside restarts of the server and of clients."""

import random
from itertools import product

import pytest
import torch

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import ArrayRecord, RecordDict

from tests.fast import crossed
from tests.federated.flower_rounds import Federated
from tests.federated.masked_rounds import PHASES, Masked, phase_of
from tests.federated.test_flower_faults import through_bytes
from vitguard.defenses.encryption import Aggregator, Decryptor
from vitguard.defenses.masking import MaskingServer
from vitguard.federated.flower.records import History, started

BOTH = pytest.mark.parametrize("kind", [Federated, Masked])
ROUNDS = 4
CHANCES = {
    "late": 0.5, "lost": 0.08, "kept": 0.25, "twice": 0.08, "again": 0.06, "set back": 0.06,
    "gone": 0.02, "restarts": 0.1, "dies": 0.01,
}  # fmt: skip


def train_phases(kind):
    return PHASES if kind is Masked else (None,)


@BOTH
def test_a_node_that_is_counted_is_not_refused_for_an_old_or_second_answer(
    small_vit, kind, flower_log
):
    """Its answer of the round before comes first, then its true one, and that again."""
    federated = kind(small_vit)
    send, old = federated.grid.send_and_receive, {}

    def muddled(messages, **options):
        messages = list(messages)
        phase = phase_of(messages[0]) if messages else None
        for reply in send(messages, **options):
            if reply.metadata.src_node_id == 12:
                if phase in old:
                    yield old[phase]
                old[phase] = reply
                yield reply
            yield reply

    federated.grid.send_and_receive = muddled
    strategy, _ = federated.run(3)
    assert len(old) == len(train_phases(kind)) and strategy.refused == {1: {}, 2: {}, 3: {}}
    assert [line for line in flower_log() if "12" in line and "second message" in line]
    moved = federated.seen[11][2]["head.weight"] - federated.start["head.weight"]
    assert float(moved.mean()) == pytest.approx(2 * federated.moved(), rel=0.01)


class ServerDies(Exception):
    """In the middle of a round: what it had added is gone."""


class Unsteady:
    """What becomes of the messages of a federation, and of those who send them, by a seed."""

    def __init__(self, federated, seed):
        self.federated, self.grid, self.draws = federated, federated.grid, random.Random(seed)
        self.mail, self.seen, self.steady = [], set(), False
        self.send, self.grid.send_and_receive = self.grid.send_and_receive, self.sending

    def chance(self, what):
        happens = self.draws.random() < CHANCES[what] * (what == "late" or not self.steady)
        self.seen |= {what} if happens else set()
        return happens

    def sending(self, messages, **options):
        for message in list(messages):
            node = message.metadata.dst_node_id
            while self.mail and self.chance("late"):
                yield self.mail.pop(self.draws.randrange(len(self.mail)))
            for _ in range(1 + self.chance("again")):
                before = through_bytes(self.grid.contexts[node])
                (reply,) = self.send([message], **options)
                if self.chance("set back"):  # the process ended before its state was kept
                    self.grid.contexts[node] = before
                if self.chance("gone"):
                    self.grid.contexts[node].state = RecordDict()
                if self.chance("restarts"):
                    self.grid.contexts[node] = through_bytes(self.grid.contexts[node])
                    self.grid.apps[node] = self.federated.app(node)
                lost = self.chance("lost")
                if lost or self.chance("kept"):
                    self.mail.append(reply)
                yield from [] if lost else [reply] * (1 + self.chance("twice"))
                if self.chance("dies"):
                    raise ServerDies


@pytest.fixture
def summed(monkeypatch):
    """Return the weights by client of each sum that was made, the newest last."""
    made, finish, mean = [], Aggregator.finish, MaskingServer.mean

    def noting(of):
        def noted(self, **settings):
            total = of(self, **settings)
            made.append(self.weights)
            return total

        return noted

    monkeypatch.setattr(Aggregator, "finish", noting(finish))
    monkeypatch.setattr(MaskingServer, "mean", noting(mean))
    return made


def step_of(federated, arrays, before):
    """What the last round added to each value in a sum, and how far off it may be."""
    if isinstance(federated, Masked):
        after, start = (a.to_torch_state_dict() for a in (arrays, before))
        names = federated.terms.manifest.names
        return {n: after[n] - start[n] for n in names}, 1e-6
    history = History.of(arrays)
    *earlier, last = history.steps
    base = started(history.start, history.run)
    for step in earlier:
        base = step.version(base)
    opener = Decryptor(federated.keys.for_client("0"), federated.manifest)
    return opener.decrypt(last.total, round_id=last.number, base=base), None


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kind"), crossed(range(4), [Federated, Masked]))
def test_a_sum_is_that_of_the_counted_clients_whatever_comes_late_twice_or_never(
    small_vit, tmp_path, monkeypatch, summed, seed, kind
):
    """Each training adds a number of its own, so that no two sums are alike."""
    random.seed(seed)  # for Flower's choice of the order of nodes
    federated, trained = kind(small_vit), []
    federated.folder = tmp_path  # with journals, where there are any
    unsteady = Unsteady(federated, seed)

    def own(node):
        def adds(state, metrics):
            more = 1e-4 * len(trained)
            trained.append((federated.names[node], version, 0.001 * (node - 10) + more))
            return {n: t + more if t.is_floating_point() else t for n, t in state.items()}, metrics

        return adds

    federated.spoil = {node: own(node) for node in federated.names}
    arrays, version, first, checked = ArrayRecord(federated.start), 0, {}, 0
    for number in range(ROUNDS):
        summed.clear()
        unsteady.steady = number == ROUNDS - 1  # then only what is old still comes
        strategy = federated.strategy(**first)
        try:
            result = strategy.start(federated.grid, arrays, num_rounds=1)
        except ServerDies:
            result = None
        if kind is Masked:
            first = {"first_round": strategy.next_round}
        if result is None or not summed:
            continue  # the server goes on from what it had
        (weights,) = summed
        moved, allowed = step_of(federated, result.arrays, arrays)
        if allowed is None:
            nodes = [n for n, name in federated.names.items() if name in weights]
            allowed = federated.worst(nodes) + 1e-6
        values = torch.cat([t.flatten().double() for t in moved.values()])
        trainings = [[c for who, v, c in trained if (who, v) == (n, version)] for n in weights]
        slow = [
            sum(c * w for c, w in zip(each, weights.values(), strict=True)) / sum(weights.values())
            for each in product(*trainings)
        ]
        off = min(float((values - due).abs().max()) for due in slow)
        assert off <= allowed, f"off by {off}, and {allowed} is allowed"
        checked += 1
        if unsteady.draws.random() < 0.8:  # else the server dies before it has saved the model
            arrays, version = result.arrays, version + 1
    assert checked and len(unsteady.seen) >= 4
