"""The sum of masked values is the plain weighted sum, whoever drops out, or there is none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitguard.errors import Rejected

PHASES = ("keys", "shares", "values", "agreement", "answers")


def check_mean(run, server, names):
    total = server.finish()
    opened = run.opener().open(total, round_id=5, base="v1")
    wanted, step = run.plain_mean(names), run.step(names)
    for found in (opened, server.mean()):
        for name, tensor in wanted.items():
            assert found[name].shape == tensor.shape
            assert (found[name].double() - tensor).abs().max() <= step, name
    assert server.clients == tuple(sorted(names))


@pytest.mark.parametrize("count", range(3, 11))
def test_the_average_is_the_plain_weighted_one_within_the_quantisation(make_run, count):
    run = make_run(count)
    _, server = run.drive()
    check_mean(run, server, run.names)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_up_to_two_clients_may_drop_out_at_each_phase(make_run, phase, number):
    run = make_run(7)
    lost = [run.names[5], run.names[0]][:number]
    _, server = run.drive(dropouts={phase: lost})
    counted = run.names if phase in ("agreement", "answers") else set(run.names) - set(lost)
    check_mean(run, server, sorted(counted))


def test_clients_may_drop_out_at_several_phases_of_one_round(make_run):
    run = make_run(10)
    lost = {"shares": [run.names[1]], "values": [run.names[4]], "answers": [run.names[9]]}
    _, server = run.drive(dropouts=lost)
    check_mean(run, server, [c for n, c in enumerate(run.names) if n not in (1, 4)])


@pytest.mark.parametrize("phase", PHASES)
def test_too_many_dropouts_are_one_clear_line_and_no_sum(make_run, phase):
    run = make_run(5)
    with pytest.raises(Rejected, match=r"3 of 5 clients .* fewer than 4: there is no sum") as e:
        _, server = run.drive(dropouts={phase: run.names[:2]})
        server.finish()
    assert "\n" not in str(e.value) and e.value.cause == "clients"


def test_four_bytes_a_value_go_up_and_down(make_run):
    run, sizes = make_run(3, values=20_000), []

    def change(phase, name, message):
        sizes.append(len(message))
        return message

    _, server = run.drive(change=change)
    assert max(sizes) < 4 * 20_006 + 300
    assert len(server.finish()) < 4 * 20_006 + 300


def test_sums_at_the_bound_of_all_clients_do_not_wrap_around(make_run):
    run = make_run(10, values=4)
    run.weights = dict.fromkeys(run.names, 4.0)
    for sign in (1.0, -1.0):
        run.update = lambda name, sign=sign: {
            k: torch.full(t.shape, sign) for k, t in run.template.items()
        }
        _, server = run.drive()
        check_mean(run, server, run.names)


def test_values_beyond_their_bound_are_refused_or_clipped_and_counted(make_run):
    run = make_run(3)
    wrong = {**run.update("client-0"), "b": torch.tensor([[9.0, float("nan")]] * 3)}
    clients, server = run.drive(until="inbox")
    with pytest.raises(ValueError, match="6 others"):
        clients["client-0"].mask(wrong)
    clients["client-0"].outliers = "clip"
    server.add_masked(clients["client-0"].mask(wrong))
    assert server.clipped == {"client-0": 6} and clients["client-0"].clipped == {"b": 6}


@settings(max_examples=12, deadline=None)
@given(data=st.data(), count=st.integers(3, 6))
def test_random_dropouts_give_the_right_sum_or_none(data, count):
    from tests.defenses.masking.conftest import Run

    run = Run(count, values=5)
    lost = {p: data.draw(st.sets(st.sampled_from(run.names), max_size=1)) for p in PHASES}
    try:
        _, server = run.drive(dropouts=lost)
        server.finish()
    except Rejected as error:
        assert error.cause == "clients"
        return
    early = lost["keys"] | lost["shares"] | lost["values"]
    check_mean(run, server, [c for c in run.names if c not in early])
