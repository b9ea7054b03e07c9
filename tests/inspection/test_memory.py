"""What a client remembers: a projection of the weights that it accepted."""

import json

import pytest
import torch

from tests.inspection.test_look import batch, make
from vitguard.errors import InputError
from vitguard.guard import protect
from vitguard.inspection import Memory, weights_of
from vitguard.vit import Anatomy


def moved(model, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: w + size * w.std() * torch.randn(w.shape, generator=generator) if w.dim() > 1 else w
        for n, w in weights_of(model).items()
    }


def test_the_move_is_that_of_the_weights_within_the_projection():
    model, memory = make(), Memory()
    weights = weights_of(model)
    memory.accept(memory.traces(weights, Anatomy.of(model)))
    for size in (0.1, 0.5):
        new = moved(model, size)
        moves = memory.moves(memory.traces(new, Anatomy.of(model)))
        for name, move in moves.items():
            true = (new[name] - weights[name]).norm() / max(new[name].norm(), weights[name].norm())
            assert 0.4 * true < move < 1.9 * true, name


def test_weights_of_another_origin_are_far_from_the_accepted_ones():
    model = make()
    guard = protect(model, [])
    guard.accept(weights_of(model))
    near = guard.inspect(moved(model, 0.05), *batch())
    far = guard.inspect(weights_of(make(seed=5)), *batch())
    assert not near.suspicious and not near.notes
    assert far.suspicious and "moved" in {s.name for s in far.worst}


def test_a_move_far_beyond_those_of_earlier_rounds_is_suspicious():
    model = make()
    guard = protect(model, [])
    for seed in range(5):
        guard.accept(moved(model, 1e-4, seed))
    found = guard.inspect(moved(model, 0.3), *batch())
    assert {"jumped"} == {s.name for s in found.worst}


def test_the_memory_is_part_of_the_guards_state_and_goes_on_after_a_restart():
    model = make()
    guard = protect(model, [])
    assert "inspection" not in guard.state_dict()
    guard.accept(weights_of(model))
    again = protect(make(), [])
    again.load_state_bytes(guard.state_bytes())
    assert again.state_dict()["inspection"] == guard.state_dict()["inspection"]
    assert json.loads(guard.state_bytes())["inspection"]["version"] == 1
    assert "inspection" not in json.loads(guard.state_bytes(draws=False, memory=False))
    assert again.inspect(weights_of(make(seed=5)), *batch()).suspicious


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 2},
        {"key": "a"},
        {"rounds": -1},
        {"rounds": 0.5},
        {"key": True},
        {"key": 10**400},
        {"farthest": 10**400},
        {"last": {"a": [10**400] * 64}},
        {"more": 1},
        {"farthest": float("nan")},
        {"last": {"a": [1.0]}},
        {"last": {"a": [float("inf")] * 64}},
        {"last": 3},
    ],
)
def test_a_state_that_is_something_else_is_refused_and_changes_nothing(wrong):
    model = make()
    guard = protect(model, [])
    guard.accept(weights_of(model))
    state = guard.state_dict()
    before = json.dumps(state)
    with pytest.raises(InputError):
        guard.load_state_dict({**state, "inspection": {**state["inspection"], **wrong}})
    assert json.dumps(guard.state_dict()) == before


def test_two_clients_project_differently_so_that_no_server_can_hide_a_move():
    weights, anatomy = weights_of(make()), Anatomy.of(make())
    first, second = (Memory().traces(weights, anatomy) for _ in range(2))
    assert not any(torch.equal(first[n], second[n]) for n in first)
