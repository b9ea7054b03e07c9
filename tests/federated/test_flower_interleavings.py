"""Answers that come late, twice or never, beside restarts of the server and of clients."""

import pytest

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from tests.federated.flower_rounds import Federated
from tests.federated.masked_rounds import PHASES, Masked, phase_of

BOTH = pytest.mark.parametrize("kind", [Federated, Masked])


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
