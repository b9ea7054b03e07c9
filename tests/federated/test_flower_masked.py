"""Masks in Flower, on its own messages: what leaves, who may be missing, what a server tries."""

import json
import weakref

import pytest
import torch

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum

import vitguard as vg
from tests.federated.flower_rounds import each
from tests.federated.masked_rounds import NODES, PHASES, Masked, phase_of
from vitguard.defenses.masking import MaskingServer, wire
from vitguard.errors import Incompatible, InputError
from vitguard.federated.flower.masked_client import BODY
from vitguard.federated.flower.records import RUN, started

CLOSE = 1e-5


@pytest.fixture
def masked(small_vit):
    return Masked(small_vit)


@pytest.mark.slow
def test_each_round_adds_the_weighted_average(masked):
    strategy, result = masked.run(2)
    assert strategy.refused == {1: {}, 2: {}}
    assert masked.error(result, rounds=2) < CLOSE
    assert torch.equal(result.arrays.to_torch_state_dict()["pos_embed"], masked.start["pos_embed"])
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(0.5)


@pytest.mark.slow
def test_nothing_unmasked_is_in_any_message(masked):
    masked.run(2)
    assert not masked.unmasked() and len(masked.own) > 2 * len(NODES)


@pytest.mark.slow
def test_the_search_finds_integers_whose_masks_are_missing(masked, monkeypatch):
    from vitguard.defenses.masking import secret_sharing

    monkeypatch.setattr(secret_sharing, "add_mask", lambda total, key, sign: None)
    masked.run(1)
    assert masked.unmasked() == list(NODES)


def test_secrets_that_rest_in_the_context_are_encrypted_and_gone_after_the_round(
    masked, monkeypatch
):
    from vitguard.defenses.masking import client as module

    seeds, original = [], module._seed

    def seed():
        made = original()
        seeds.append(made.reveal())
        return made

    monkeypatch.setattr(module, "_seed", seed)
    at_rest = []

    def change(phase, message):
        states = [
            c.state.config_records.get("vitguard.masks") for c in masked.grid.contexts.values()
        ]
        at_rest.extend(bytes(s["state"]) for s in states if s is not None)
        return message

    masked.change = change
    masked.run(1)
    assert len(seeds) == 3 * len(NODES) and len(at_rest) > 3 * len(NODES)
    everything = b"".join(at_rest) + b"".join(masked.grid.sent)
    assert not any(s in everything or s.hex().encode() in everything for s in seeds)
    for node in NODES:
        client = masked.identity(node).masker()
        state = masked.grid.contexts[node].state.config_records["vitguard.masks"]["state"]
        client.load_state_bytes(state)
        assert client.last == 1 and client._round is None


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_the_round_goes_on_where_one_or_two_clients_are_silent_in_a_phase(masked, phase, count):
    gone = NODES[1 : 1 + count]
    masked.silent = {phase: gone}
    strategy, result = masked.run(1)
    assert set(strategy.refused[1]) == set(gone)
    assert all(f"phase of {phase}" in reason for reason in strategy.refused[1].values())
    summed = phase in ("agreement", "answers")  # their values had arrived
    left = NODES if summed else [n for n in NODES if n not in gone]
    assert masked.error(result, left) < CLOSE


def test_clients_that_are_silent_in_different_phases_are_left_out_one_by_one(masked):
    masked.silent = {"shares": [12], "answers": [15]}
    strategy, result = masked.run(1)
    assert set(strategy.refused[1]) == {12, 15}
    assert masked.error(result, [n for n in NODES if n != 12]) < CLOSE


@pytest.mark.parametrize("phase", PHASES)
def test_too_few_clients_in_a_phase_end_the_round_and_the_next_one_works(
    masked, phase, monkeypatch
):
    from vitguard.federated.flower import masked_server

    lines = []
    monkeypatch.setattr(masked_server, "log", lambda level, line, *args: lines.append(line % args))
    masked.silent = {phase: NODES[:3]}
    strategy, result = masked.run(1)
    assert masked.unchanged(result) and 1 not in result.train_metrics_clientapp
    assert len(lines) == 1 and "the model is as it was" in lines[0] and phase in lines[0]
    masked.silent = {}
    _, result = masked.run(1, masked.strategy(first_round=strategy.next_round))
    assert masked.error(result) < CLOSE


@pytest.mark.slow
def test_a_client_that_was_away_in_one_round_is_back_in_the_next(masked):
    masked.silent = {"values": [12]}
    strategy = masked.strategy()
    _, first = masked.run(1, strategy)
    masked.silent = {}
    _, second = masked.run(1, strategy, first.arrays)
    assert strategy.refused[1] == {}
    after = second.arrays.to_torch_state_dict()["head.weight"]
    due = masked.moved() + masked.moved([n for n in NODES if n != 12])
    assert float((after - masked.start["head.weight"] - due).abs().max()) < CLOSE


def forged(masked, message, kind, body):
    """The same message, with a body that the server made up and signed."""
    asked = message.content.config_records["vitguard"]
    binding = masked.terms.binding(asked["vitguard-round"], asked["vitguard-base"])
    made = wire.write_message(kind, "server", json.dumps(body).encode(), binding, masked.signing)
    content = {**message.content, "vitguard": ConfigRecord({**asked, BODY: made})}
    return Message(
        content=RecordDict(content),
        dst_node_id=message.metadata.dst_node_id,
        message_type=message.metadata.message_type,
    )


def lying_about(masked, told):
    """A server that names other survivors to some nodes: `told` is names by node."""

    def change(phase, message):
        node = message.metadata.dst_node_id
        if phase != "agreement" or node not in told:
            return message
        return forged(masked, message, wire.SURVIVORS, {"survivors": told[node]})

    return change


def revealed(masked):
    """All shares in the answers that nodes sent: (node, kind, of whom)."""
    shown = set()
    for data in masked.grid.sent:
        for kind in ("own", "pairs"):
            at = data.find(b'{"own": ')
            if at >= 0:
                stated, _ = json.JSONDecoder().raw_decode(data[at:].decode("latin1"))
                shown |= {(kind, of) for of in stated[kind]}
    return shown


@pytest.mark.parametrize("hides", [False, True])
def test_a_server_that_lies_about_who_dropped_out_gets_no_shares(masked, monkeypatch, hides):
    """Half of the clients are told that one survived, the others that it did not.

    It gives out every signature, of either set; or to each client those of its own set alone.
    """
    names = sorted(masked.names.values())
    signed, told = {}, {}

    def add(self, message, *, sender=None):
        signed[sender] = message
        self._agreements[sender] = message

    monkeypatch.setattr(MaskingServer, "add_agreement", add)
    lie = lying_about(masked, dict.fromkeys(NODES[:3], names[:5]))

    def change(phase, message):
        if phase == "agreement":
            told[message.metadata.dst_node_id] = message.metadata.dst_node_id in NODES[:3]
        if phase != "answers" or not hides:
            return lie(phase, message)
        half = told[message.metadata.dst_node_id]
        own = {n: signed[n] for node, n in masked.names.items() if told.get(node) == half}
        body = {n: m.hex() for n, m in own.items() if n in signed}
        return forged(masked, message, wire.AGREEMENTS, body)

    masked.change = change
    strategy, result = masked.run(1)
    assert masked.unchanged(result) and len(strategy.refused[1]) == len(NODES)
    assert len(signed) == len(NODES)
    assert revealed(masked) == set()


@pytest.mark.slow
def test_both_shares_of_one_client_are_never_given(masked):
    """A server asks all for the shares of one set of survivors, then for those of another."""
    names = sorted(masked.names.values())
    masked.run(1)
    shown = revealed(masked)
    assert {of for kind, of in shown if kind == "own"} == set(names)
    masked.grid.sent.clear()
    asked = []

    def twice(phase, message):
        if phase == "agreement":
            asked.append(message)
            other = forged(masked, message, wire.SURVIVORS, {"survivors": names[:5]})
            node = message.metadata.dst_node_id
            first = masked.grid._answered(message)
            assert not first.has_error()
            second = masked.grid._answered(other)
            assert second.has_error() and "phase" in second.error.reason, node
        return message

    masked.change = twice
    masked.run(1, masked.strategy(first_round=2))
    assert len(asked) == len(NODES)
    shown = revealed(masked)
    assert not {of for kind, of in shown if kind == "own"} & {
        of for kind, of in shown if kind == "pairs"
    }


@pytest.mark.parametrize("phase", ["shares", "values", "agreement", "answers"])
def test_two_messages_at_once_get_one_answer(masked, tmp_path, phase):
    """A SuperNode gives both processes the same state; so does whoever sets a state back."""
    masked.folder, second = tmp_path, []

    def change(now, message):
        if now == phase:
            context = masked.grid.contexts[message.metadata.dst_node_id]
            before = RecordDict(dict(context.state))
            masked.grid._answered(message)
            context.state = before
            second.append(masked.grid._answered(message))
        return message

    masked.change = change
    _, result = masked.run(1)
    assert len(second) == len(NODES) and masked.unchanged(result)
    assert all(reply.has_error() and "a second time" in reply.error.reason for reply in second)


@pytest.mark.parametrize("said", [False, True])
def test_a_server_that_sends_one_client_another_model_gets_nothing_of_it(masked, said):
    """The message names the old version of the model, or that of the other model."""
    trained = {k for k, t in masked.start.items() if t.is_floating_point() and k != "pos_embed"}
    other = {k: t + 1 if k in trained else t for k, t in masked.start.items()}

    def change(phase, message):
        if phase != "values" or message.metadata.dst_node_id != 12:
            return message
        content = {**message.content, "arrays": ArrayRecord(other)}
        if said:
            asked = message.content["vitguard"]
            content["vitguard"] = ConfigRecord(
                {**asked, "vitguard-base": started(other, asked[RUN])}
            )
        return Message(content=RecordDict(content), dst_node_id=12, message_type="train")

    masked.change = change
    strategy, result = masked.run(1)
    due = "of start_round" if said else "another model"
    assert list(strategy.refused[1]) == [12] and due in strategy.refused[1][12]
    assert masked.error(result, [n for n in NODES if n != 12]) < CLOSE


def test_a_stock_strategy_gets_neither_masked_nor_plain_weights(masked):
    FedAvg(fraction_evaluate=0.0).start(masked.grid, ArrayRecord(masked.start), num_rounds=1)
    replies = masked.grid.sent[1::2]
    assert len(replies) == len(NODES) and all(len(r) < 1000 for r in replies)


@pytest.mark.parametrize("other", [FedAdam, FedMedian, Krum])
def test_strategies_that_cannot_work_on_masked_values_are_refused_when_made(other):
    from vitguard.federated.flower import MaskedFedAvg

    for bases in ((MaskedFedAvg, other), (other, MaskedFedAvg)):
        with pytest.raises(Incompatible, match=r"FedOpt|FedAdam|FedMedian|Krum"):
            type("Mixed", bases, {})


def test_the_server_and_the_clients_can_evaluate_the_average(masked):
    seen = []

    def evaluate(number, arrays):
        seen.append(float(arrays.to_torch_state_dict()["head.weight"].mean()))

    strategy = masked.strategy(fraction_evaluate=1.0)
    result = strategy.start(
        masked.grid, ArrayRecord(masked.start), num_rounds=1, evaluate_fn=evaluate
    )
    assert seen[1] - seen[0] == pytest.approx(masked.moved(), abs=CLOSE)
    assert result.evaluate_metrics_clientapp[1]["mean"] == pytest.approx(seen[1], abs=1e-6)


def test_what_the_selection_leaves_plain_is_averaged_too(small_vit):
    masked = Masked(small_vit, select="attention")
    _, result = masked.run(1)
    after = result.arrays.to_torch_state_dict()
    for name in ("head.weight", "blocks.0.attn.qkv.weight"):
        assert float((after[name] - masked.start[name]).mean()) == pytest.approx(
            masked.moved(), abs=CLOSE
        )


@pytest.mark.slow
def test_client_privacy_under_masks_is_counted_and_a_ledger_that_went_back_is_refused(small_vit):
    privacy = vg.ClientPrivacy(epsilon=4.0, rounds=3)
    masked = Masked(small_vit, outliers="clip", private=[privacy])
    strategy = masked.strategy()
    _, first = masked.run(1, strategy)
    kept = RecordDict({"vitguard.kept": masked.grid.contexts[12].state["vitguard.kept"]})
    _, second = masked.run(1, strategy, first.arrays)
    spent = [r.train_metrics_clientapp[1]["epsilon"] for r in (first, second)]
    assert spent == pytest.approx([privacy.spent(r).epsilon for r in (1, 2)])
    assert strategy.refused[1] == {} and set(strategy.ledgers.most.values()) == {2}
    masked.grid.contexts[12].state["vitguard.kept"] = kept["vitguard.kept"]
    masked.run(1, strategy, second.arrays)
    assert list(strategy.refused[1]) == [12] and "ledger" in strategy.refused[1][12]


@pytest.mark.slow
def test_values_beyond_the_bound_are_clipped_and_counted_where_the_client_says_so(small_vit):
    masked = Masked(small_vit, outliers="clip")
    masked.spoil[12] = each(lambda t: t + 100)
    _, result = masked.run(1)
    assert result.train_metrics_clientapp[1]["vitguard-clipped"] > 0
    strategy, _ = masked.run(1, masked.strategy(first_round=2, max_clipped=3))
    assert list(strategy.refused[1]) == [12] and "beyond bounds" in strategy.refused[1][12]


def test_a_model_that_is_not_that_of_the_terms_is_refused_at_the_start(masked):
    start = {k: t for k, t in masked.start.items() if k != "head.weight"}
    with pytest.raises(InputError, match=r"head\.weight"):
        masked.run(1, initial=ArrayRecord(start))


def test_the_server_holds_one_reply_at_a_time(masked):
    masked.grid._record = False
    replies, most = [], []
    original = masked.grid._answered

    def answered(message):
        reply = original(message)
        replies.append(weakref.ref(reply))
        if phase_of(message) == "values":
            most.append(sum(r() is not None for r in replies))
        return reply

    masked.grid._answered = answered
    masked.run(1)
    assert len(most) == len(NODES) and max(most) <= 2  # the one at hand, and the one that comes
