"""No two requests of the secret source share a draw, whoever asks."""

from __future__ import annotations

import copy
import os
import pickle
import threading

import pytest
import torch

from vitguard.draws import Draws


def in_a_fork(act):
    """What `act` returns as bytes in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, act())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        found = file.read()
    os.waitpid(child, 0)
    return found


def in_threads(act, count=4):
    found = []
    threads = [threading.Thread(target=lambda: found.append(act())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


ASKED = {
    "words": lambda draws: draws.words(4).tobytes(),
    "normal": lambda draws: draws.normal((4,)).numpy().tobytes(),
    "noised": lambda draws: draws.noised(torch.zeros(4), 1.0).numpy().tobytes(),
    "keys": lambda draws: draws.keys(2).numpy().tobytes(),
    "uniform": lambda draws: draws.uniform(2).tobytes(),
}


@pytest.mark.parametrize("what", ASKED)
def test_no_two_requests_share_a_draw_over_threads_forks_copies_and_pickles(what):
    draws, ask = Draws(), ASKED[what]
    found = [ask(draws) for _ in range(3)]
    found += [ask(copy.deepcopy(draws)), ask(pickle.loads(pickle.dumps(draws))), ask(Draws())]
    found += in_threads(lambda: ask(draws))
    found += [in_a_fork(lambda: ask(draws)), in_a_fork(lambda: ask(draws)), ask(draws)]
    assert len(set(found)) == len(found) == 13


def test_a_copy_answers_the_same_keys_with_other_numbers():
    draws, keys = Draws(), torch.tensor([1, 2])
    numbers = [d.keyed(keys, 3, stream=0).tobytes() for d in (draws, copy.deepcopy(draws), Draws())]
    assert len(set(numbers)) == 3
    assert draws.keyed(keys, 3, stream=0).tobytes() == numbers[0]
    assert draws.keyed(keys, 3, stream=1).tobytes() != numbers[0]


def test_draws_of_a_seed_repeat_with_it_and_go_on_between_requests():
    one, other = (Draws(torch.Generator().manual_seed(5)) for _ in range(2))
    assert [ASKED["words"](one) for _ in range(2)] == [ASKED["words"](other) for _ in range(2)]
    assert ASKED["words"](one) != ASKED["words"](one)
