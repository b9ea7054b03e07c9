"""Faults of a masked Flower round, each on Flower's own messages; the table in the docs names all.

The round goes on without the faulty client, or fails in one clear line; the model is never wrong.
"""

import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.common.serde import context_from_proto, context_to_proto

import vitguard as vg
from tests.fast import crossed
from tests.federated.flower_rounds import each, quotes, raises, weighs
from tests.federated.masked_rounds import BOUND, NODES, PHASES, Masked, phase_of
from vitguard.defenses.encryption import Manifest, SigningKey
from vitguard.defenses.masking import Terms
from vitguard.federated.flower.masked_client import BODY
from vitguard.federated.flower.records import SEALED, SEALED_TYPE

CLOSE = 1e-5
FAULTY = 12
OTHERS = [n for n in NODES if n != FAULTY]
PAGE = Path(__file__).parents[2] / "docs" / "masking.md"


@pytest.fixture
def masked(small_vit):
    """A federation; after whatever went wrong in it no message holds what was not masked."""
    federation = Masked(small_vit)
    yield federation
    assert not federation.unmasked()


def left_out(masked, said, **settings):
    """Play a round; the faulty node alone must be missing, for a reason, and the sum right."""
    strategy, result = masked.run(1, **settings)
    assert list(strategy.refused[1]) == [FAULTY] and re.search(said, strategy.refused[1][FAULTY])
    assert masked.error(result, OTHERS) < CLOSE
    return strategy


OF_THE_APP = {
    "raises": (raises, "RuntimeError in the app"),
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


@pytest.mark.parametrize("fault", OF_THE_APP)
def test_a_client_whose_training_goes_wrong_is_left_out(masked, fault):
    masked.spoil[FAULTY], said = OF_THE_APP[fault]
    left_out(masked, said)
    assert b"secret pixel" not in b"".join(masked.grid.sent)


def altered(masked, phase, change):
    """Let the faulty node's answer of a phase be another one."""
    app = masked.app(FAULTY)

    def answer(message, context):
        reply = app(message, context)
        return change(message, reply) if phase_of(message) == phase else reply

    masked.grid.apps[FAULTY] = answer


def said(body):
    return RecordDict({"vitguard": ConfigRecord({BODY: body})})


GARBAGE = {
    "other bytes": lambda reply: said(b"garbage" * 40),
    "no bytes": lambda reply: said(b""),
    "text": lambda reply: said("garbage"),
    "nothing": lambda reply: RecordDict(),
    "an error": lambda reply: Error(2, "ValueError"),
    "a changed byte": lambda reply: said(
        reply.content.config_records["vitguard"][BODY][:-70] + bytes(70)
    ),
}


@pytest.mark.parametrize(
    ("phase", "garbage"), crossed([p for p in PHASES if p != "values"], GARBAGE)
)
def test_garbage_in_a_short_phase_leaves_the_client_out_of_those_after_it(masked, phase, garbage):
    altered(masked, phase, lambda m, reply: Message(GARBAGE[garbage](reply), reply_to=m))
    strategy, result = masked.run(1)
    assert list(strategy.refused[1]) == [FAULTY]
    summed = phase in ("agreement", "answers")
    assert masked.error(result, NODES if summed else OTHERS) < CLOSE


def sealed(data, stype=SEALED_TYPE, **metrics):
    arrays = ArrayRecord({SEALED: Array("uint8", (len(data),), stype, data)})
    numbers = MetricRecord({"num-examples": 2, **metrics})
    return RecordDict({"arrays": arrays, "metrics": numbers})


def values_of(reply):
    return next(iter(reply.content.array_records.values()))[SEALED].data


VALUES = {
    "garbage": lambda r: sealed(b"abc"),
    "a byte changed": lambda r: sealed(values_of(r)[:-100] + b"x" + values_of(r)[-99:]),
    "one value fewer": lambda r: sealed(values_of(r)[:-4]),
    "plain weights": lambda r: RecordDict(
        {
            "arrays": ArrayRecord({"head.weight": torch.ones(2, 12)}),
            "metrics": MetricRecord({"num-examples": 2}),
        }
    ),
    "an array of another type": lambda r: sealed(values_of(r), stype="numpy.ndarray"),
    "no arrays": lambda r: RecordDict({"metrics": MetricRecord({"num-examples": 2})}),
    "nothing": lambda r: RecordDict(),
    "another weight than it signed": lambda r: sealed(values_of(r), **{"num-examples": 3}),
    "plain values of a masked tensor beside": lambda r: RecordDict(
        {
            "arrays": ArrayRecord(
                {
                    **next(iter(r.content.array_records.values())),
                    "head.bias": Array(torch.ones(2).numpy()),
                }
            ),
            "metrics": MetricRecord({"num-examples": 2}),
        }
    ),
}


@pytest.mark.parametrize("fault", VALUES)
def test_values_that_do_not_hold_are_refused_and_change_no_sum(masked, fault):
    altered(masked, "values", lambda m, reply: Message(content=VALUES[fault](reply), reply_to=m))
    left_out(masked, ".")


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_message_of_an_old_round_is_refused_in_every_phase(masked, phase):
    held = []

    def replay(message, reply):
        held.append(reply.content)
        return Message(content=held[0], reply_to=message)

    altered(masked, phase, replay)
    strategy, result = masked.run(2)
    assert strategy.refused[1] == {} and list(strategy.refused[2]) == [FAULTY]
    assert "another run, round" in strategy.refused[2][FAULTY]
    left = NODES if phase in ("agreement", "answers") else OTHERS
    after = result.arrays.to_torch_state_dict()["head.weight"]
    due = masked.moved() + masked.moved(left)
    assert float((after - masked.start["head.weight"] - due).abs().max()) < CLOSE


@pytest.mark.slow
def test_old_shares_that_the_server_delivers_are_refused_by_the_client(masked):
    """The server gives a client the shares that were made for it in the round before."""
    held = []

    def change(phase, message):
        if phase != "values" or message.metadata.dst_node_id != FAULTY:
            return message
        asked = message.content.config_records["vitguard"]
        held.append(asked[BODY])
        content = {**message.content, "vitguard": ConfigRecord({**asked, BODY: held[0]})}
        return Message(content=RecordDict(content), dst_node_id=FAULTY, message_type="train")

    masked.change = change
    strategy, _ = masked.run(2)
    assert strategy.refused[1] == {} and list(strategy.refused[2]) == [FAULTY]
    assert "another run, round" in strategy.refused[2][FAULTY]


def test_two_clients_with_one_name_count_once(masked):
    masked.names[FAULTY] = masked.names[11]
    strategy, result = masked.run(1)
    ((node, reason),) = strategy.refused[1].items()  # whichever came second
    assert node in (11, FAULTY) and "second message" in reason
    assert masked.error(result, [n for n in NODES if n != node]) < CLOSE


def test_a_client_cannot_answer_for_another(masked):
    """Two clients work together: one sends what the other made."""
    made = []

    def change(phase, message):
        if phase == "shares" and message.metadata.dst_node_id == 11:
            made.append(masked.app(11)(message, masked.grid.contexts[11]).content)
            masked.grid.apps[11] = later
        return message

    def later(message, context):
        if phase_of(message) == "shares":
            return Message(content=made[0], reply_to=message)
        return masked.app(11)(message, context)

    altered(masked, "shares", lambda m, reply: Message(content=made[0], reply_to=m))
    masked.change = change
    left_out(masked, "from client")


def test_a_client_with_another_identity_is_left_out(masked):
    masked.identities[masked.names[FAULTY]] = SigningKey.generate()
    left_out(masked, "identity key")


@pytest.mark.slow
def test_a_mod_without_attach_sends_nothing(masked):
    masked.attached[FAULTY] = False
    left_out(masked, "attach")


def test_an_app_without_the_mod_is_left_out(masked):
    masked.grid.apps[FAULTY] = masked.app(FAULTY, mods=[])
    strategy, result = masked.run(1)
    assert list(strategy.refused[1]) == [FAULTY]
    assert masked.error(result, OTHERS) < CLOSE


STACKS = {
    "no masks": lambda own, client: own[:-1],
    "with encryption": lambda own, client: [*own[:-1], vg.EncryptedGradients()],
    "with masks twice": lambda own, client: [*own, vg.MaskedAggregation(client=client)],
}


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_that_does_not_mask_once_sends_nothing(masked, stack):
    """The app is right for another strategy, or for none."""
    masked.stacks[FAULTY] = lambda client: STACKS[stack](masked.stack(client), client)
    left_out(masked, ".")


def test_a_client_with_terms_of_another_model_is_left_out(masked):
    """Its terms.json is of an earlier run, with another bound."""
    agreed = masked.terms
    old = Manifest.of({n: masked.start[n] for n in agreed.manifest.names}, bounds=2 * BOUND)
    masked.own_terms[FAULTY] = Terms(old, agreed.identities, agreed.server, agreed.threshold)
    left_out(masked, "another run, round")


def test_a_client_that_was_away_comes_back_after_two_rounds(masked):
    strategy = masked.strategy()

    def change(phase, message):
        masked.grid.late = {FAULTY} if strategy.next_round in (3, 4) else set()
        return message

    masked.change = change
    strategy, result = masked.run(4, strategy)
    gone = {FAULTY: "no answer in the phase of keys"}
    assert strategy.refused == {1: {}, 2: gone, 3: gone, 4: {}}
    after = result.arrays.to_torch_state_dict()["head.weight"]
    due = 2 * masked.moved() + 2 * masked.moved(OTHERS)
    assert float((after - masked.start["head.weight"] - due).abs().max()) < CLOSE


@pytest.mark.slow
def test_a_client_that_lost_its_state_within_a_round_is_left_out_and_back_in_the_next(masked):
    strategy = masked.strategy()

    def change(phase, message):
        if phase == "values" and strategy.next_round == 2:
            masked.grid.contexts[FAULTY].state = RecordDict()
        return message

    masked.change = change
    strategy, _ = masked.run(2, strategy)
    assert list(strategy.refused[1]) == [FAULTY] and "none" in strategy.refused[1][FAULTY]
    assert strategy.refused[2] == {}


@pytest.mark.slow
def test_a_client_process_that_starts_anew_for_every_message_loses_nothing(masked):
    def restarted(phase, message):
        node = message.metadata.dst_node_id
        crossed = context_from_proto(context_to_proto(masked.grid.contexts[node]))
        assert isinstance(crossed, Context)
        masked.grid.contexts[node] = crossed
        masked.grid.apps[node] = masked.app(node)
        return message

    masked.change = restarted
    strategy, result = masked.run(2)
    assert strategy.refused == {1: {}, 2: {}}
    assert masked.error(result, rounds=2) < CLOSE


@pytest.mark.slow
def test_a_server_that_starts_again_goes_on_with_the_next_round(masked):
    strategy, result = masked.run(1)
    later, result = masked.run(1, masked.strategy(first_round=strategy.next_round), result.arrays)
    assert later.refused == {1: {}}
    assert masked.error(result, rounds=2) < CLOSE


def test_a_server_that_starts_again_with_an_old_number_gets_no_round(masked):
    _, first = masked.run(1)
    strategy, result = masked.run(1, masked.strategy(), first.arrays)
    assert all("replay" in r or "after round 1" in r for r in strategy.refused[1].values())
    assert len(strategy.refused[1]) == len(NODES)
    after, kept = result.arrays.to_torch_state_dict(), first.arrays.to_torch_state_dict()
    assert after.keys() == kept.keys() and all(torch.equal(after[n], kept[n]) for n in kept)


def test_more_clipped_values_than_the_strategy_allows_are_refused(masked):
    def clipped(message, reply):
        ((name, arrays),) = reply.content.array_records.items()
        ((other, metrics),) = reply.content.metric_records.items()
        counted = MetricRecord({**metrics, "vitguard-clipped": 9})
        return Message(content=RecordDict({name: arrays, other: counted}), reply_to=message)

    altered(masked, "values", clipped)
    left_out(masked, "9 values beyond bounds", max_clipped=8)


def rows():
    """The table of faults in the docs: fault, result, tests."""
    text = PAGE.read_text()
    table = text[text.index("| fault | result | test |") :].split("\n\n")[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[2:]]


NAMED = (
    "silent", "raises", "NaN", "infinity", "another shape", "other keys", "no metrics",
    "another model", "old round", "another identity", "weight 0", "weight -1", "weight 1e9",
    "plain weights", "no `ProtectMod`", "no `attach`", "two nodes with one name",
    "fewer than the threshold", "after two rounds", "the server starts again",
    "starts anew for every message",
)  # fmt: skip


def test_each_fault_of_the_table_names_a_test_and_each_test_of_a_fault_is_in_the_table():
    folder, own = Path(__file__).parent, Path(__file__).read_text()
    files = "\n".join(f.read_text() for f in sorted(folder.glob("test_flower*.py")))
    named = {name for *_, tests in rows() for name in re.findall(r"`(test_\w+)`", tests)}
    exist = set(re.findall(r"^def (test_\w+)", files, re.M))
    assert named and not named - exist
    faults = set(re.findall(r"^def (test_\w+)", own, re.M)) - {
        "test_each_fault_of_the_table_names_a_test_and_each_test_of_a_fault_is_in_the_table"
    }
    assert not faults - named
    text = " ".join(fault for fault, *_ in rows())
    for label in [*OF_THE_APP, *VALUES, *GARBAGE, *STACKS, *NAMED]:
        assert label in text, label
