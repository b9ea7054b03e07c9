"""The ledger only grows: threads, forks, copies, checkpoints and other noise than was planned."""

import copy
import json
import math
import os
import pickle
import resource
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.defenses.privacy.privacy_models import build
from vitguard.defenses.privacy import ClientPrivacy, DifferentialPrivacy, Ledger
from vitguard.errors import InputError, Unprotected
from vitguard.guard import Guard, protect

pytest.importorskip("opacus")

IMAGES, LABELS = torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])


def guarded(*stack, **settings):
    return protect(build("vit", torch.float32), list(stack), **settings)


def in_threads(work, count=4):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.slow
def test_releases_of_many_threads_are_all_counted():
    ledger = Ledger()
    in_threads(lambda: [ledger.spend(1.0, 1.0) for _ in range(250)])
    assert ledger.steps == 1000
    guard = guarded(ClientPrivacy(noise=5.0))
    update = {k: p.detach() for k, p in guard.model.named_parameters()}
    from vitguard.core import Update

    in_threads(lambda: [guard.seal(Update(update, kind="difference")) for _ in range(10)])
    assert guard.privacy_spent().steps == 40


def test_no_thread_slips_past_the_target_while_another_spends_the_rest():
    from vitguard.core import Update

    guard = guarded(ClientPrivacy(epsilon=2.0, rounds=5))
    update = {k: p.detach() for k, p in guard.model.named_parameters()}
    left, refused = [], []

    def send():
        for _ in range(5):
            try:
                left.append(guard.seal(Update(update, kind="difference")))
            except Unprotected:
                refused.append(1)

    in_threads(send)
    assert (len(left), len(refused), guard.privacy_spent().steps) == (5, 15, 5)


@pytest.mark.parametrize(
    "stack", [ClientPrivacy(epsilon=1.0, rounds=2), DifferentialPrivacy(epsilon=1.0, epochs=2)]
)
def test_a_checkpoint_of_before_does_not_bring_spent_epsilon_back(stack):
    guard = guarded(stack)
    start, after = guard.state_dict(), []
    for _ in range(2):
        guard.update(IMAGES, LABELS)
        after.append(guard.state_dict())
    for older in (start, after[0]):
        with pytest.raises(InputError, match="older one of"):
            guard.load_state_dict(older)
        with pytest.raises(Unprotected, match="at most"):
            guard.update(IMAGES, LABELS)
    guard.load_state_dict(after[1])  # the newest changes nothing
    assert guard.privacy_spent().steps == 2


def test_a_fork_spends_on_its_own_and_both_are_counted_when_they_meet():
    ledger = Ledger([(2.0, 1.0, 3)])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ledger.record(2.0, 1.0, 2)
            os.write(writing, json.dumps(ledger.state_dict()).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        of_child = json.loads(pipe.read())
    ledger.record(2.0, 1.0, 1)
    assert ledger.steps == 4  # the child's are not seen yet
    ledger.load_state_dict(of_child)
    assert ledger.steps == 6
    with pytest.raises(InputError, match="older one of 5"):
        ledger.load_state_dict(of_child)  # once more: nothing is counted twice
    assert ledger.steps == 6


def test_a_fork_is_not_held_up_by_a_thread_that_it_does_not_have():
    ledger = Ledger([(2.0, 1.0, 1)])
    held, done = threading.Event(), threading.Event()

    def hold():
        with ledger.locked():
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        ledger.record(2.0, 1.0)  # would wait for ever on the parent's lock
        os._exit(0 if ledger.steps == 2 else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_from_what_was_spent_and_are_told_apart(again):
    first = Ledger([(2.0, 1.0, 3)])
    second = again(first)
    first.record(2.0, 1.0)
    second.record(2.0, 1.0, 2)
    assert (first.steps, second.steps) == (4, 5)
    for one, other in ((first, second), (second, first)):
        joined = Ledger()
        joined.load_state_dict(one.state_dict())
        joined.load_state_dict(other.state_dict())
        assert joined.steps == 6
    guard = guarded(ClientPrivacy(noise=5.0))
    guard.update(IMAGES, LABELS)
    copied = Guard.of(copy.deepcopy(guard.model))
    copied.update(IMAGES, LABELS)
    assert (guard.privacy_spent().steps, copied.privacy_spent().steps) == (1, 2)
    guard.load_state_dict(copied.state_dict())
    assert guard.privacy_spent().steps == 2


def test_two_histories_under_one_name_both_happened():
    """A process image that was restored twice writes two histories under one name."""
    ledger = Ledger([(2.0, 1.0, 3)])
    state = ledger.state_dict()
    (name,) = state["runs"]
    other = {**state, "runs": {name: [[2.0, 1.0, 1], [0.5, 0.1, 7]]}}
    ledger.load_state_dict(other)
    assert ledger.steps == 11
    with pytest.raises(InputError, match="older one of 8"):
        ledger.load_state_dict(other)
    assert ledger.steps == 11


ENTRY = st.tuples(st.sampled_from([0.5, 1.0]), st.sampled_from([0.1, 1.0]), st.integers(1, 3))
RUNS = st.dictionaries(st.sampled_from("abc"), st.lists(ENTRY, min_size=1, max_size=3), max_size=3)


@given(st.lists(RUNS, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_joining_never_shortens_and_forgets_nothing(states):
    ledger, before = Ledger(), 0
    for runs in states:
        state = {"version": 2, "runs": runs, "void": ""}
        alone = Ledger()
        alone.load_state_dict(state)
        try:
            ledger.load_state_dict(state)
        except InputError as error:
            assert "older" in str(error)
        assert ledger.steps >= max(before, alone.steps)
        before = ledger.steps


def test_a_state_of_the_last_version_still_loads():
    ledger = Ledger()
    ledger.load_state_dict({"version": 1, "history": [[1.0, 0.5, 3], [2.0, 1.0, 1]]})
    assert ledger.history == [(1.0, 0.5, 3), (2.0, 1.0, 1)]


def test_draws_of_a_seed_void_the_guarantee_and_the_statement_says_so():
    seeded = guarded(ClientPrivacy(noise=5.0), generator=torch.Generator().manual_seed(0))
    assert seeded.privacy_spent().epsilon == 0
    seeded.update(IMAGES, LABELS)
    spent = seeded.privacy_spent()
    assert spent.epsilon == math.inf and "torch.Generator" in str(spent)
    later = guarded(ClientPrivacy(noise=5.0))
    later.load_state_dict(seeded.state_dict())
    later.update(IMAGES, LABELS)
    assert later.privacy_spent().epsilon == math.inf


@pytest.mark.parametrize("noise", [0.3, 0.1, 0.05, 0.01, 1e-3])
def test_little_noise_has_a_large_epsilon_and_takes_no_memory(noise):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = Ledger([(noise, 0.01, 100)]).spent(1e-5)
    assert spent.epsilon >= 10 and spent.accountant == "prv"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024  # KiB


@pytest.mark.slow
def test_what_is_planned_covers_no_step_with_less_noise():
    defense = DifferentialPrivacy(epsilon=1.0, epochs=10)
    noise = defense.multiplier(0.1, 100)
    planned = (noise, 0.1, 100)
    defense.refuse_beyond_target(Ledger([(noise, 0.1, 100)]), planned)
    for entry in [(noise / 4, 0.1, 100), (noise, 0.4, 100), (noise, 0.1, 400)]:
        with pytest.raises(Unprotected, match="at most epsilon 1"):
            defense.refuse_beyond_target(Ledger([entry]), planned)
