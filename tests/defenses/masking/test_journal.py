"""A client answers each phase once, also where its state was set back or is used twice at once."""

import dataclasses
import fcntl
import os
import stat
import threading

import pytest

from vitguard.defenses.masking import Journal, resting
from vitguard.defenses.masking import journal as journal_module
from vitguard.errors import InputError, Rejected


def twin(run, client, journal):
    """A second process of the same client, from the same state."""
    other = run.client(client.client_id, journal=journal)
    other.load_state_bytes(client.state_bytes())
    return other


@pytest.mark.parametrize("phase", ["shares", "values", "agreement", "answers"])
def test_two_processes_with_one_state_answer_a_phase_once(make_run, tmp_path, phase):
    run, journal = make_run(4), Journal(tmp_path / "journal")
    name = "client-0"
    clients = {c: run.client(c, journal=journal if c == name else None) for c in run.names}
    server = run.server()
    asked = {}

    def play(label, act, add):
        if label == phase:
            asked["twin"] = twin(run, clients[name], journal)
        for c, client in clients.items():
            add(act(c, client))
        if label == phase:
            with pytest.raises(Rejected) as caught:
                act(name, asked["twin"])
            assert caught.value.cause == "replay"

    play("keys", lambda c, x: x.start_round(5, weight=run.weights[c], base="v1"), server.add_keys)
    roster = server.roster()
    play("shares", lambda _, x: x.share_keys(roster), server.add_shares)
    for c, client in clients.items():
        client.take_shares(server.inbox(c))
    play("values", lambda c, x: x.mask(run.update(c)), server.add_masked)
    survivors = server.survivors()
    play("agreement", lambda _, x: x.agree(survivors), server.add_agreement)
    agreements = server.agreements()
    play("answers", lambda _, x: x.answer(agreements), server.add_answer)
    assert asked and server.mean()


def test_of_many_that_mark_at_once_one_goes_on(tmp_path):
    journal, passed = Journal(tmp_path / "journal"), []

    def mark():
        try:
            journal.mark(bytes(32), "values")
        except Rejected:
            return
        passed.append(1)

    threads = [threading.Thread(target=mark) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 1
    assert stat.S_IMODE((tmp_path / "journal").stat().st_mode) == 0o600


def test_a_process_that_waits_while_another_marks_sees_the_mark_and_is_refused(
    tmp_path, monkeypatch
):
    """The other one comes first to the lock, and holds it until its mark is on the disk."""
    journal, lock, sync, held = Journal(tmp_path / "journal"), fcntl.flock, os.fsync, []

    def waiting(file, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        journal.mark(bytes(32), "values")
        lock(file, how)

    def written(number):
        with open(journal.path) as other, pytest.raises(BlockingIOError):
            lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(sync(number))

    monkeypatch.setattr(fcntl, "flock", waiting)
    monkeypatch.setattr(os, "fsync", written)
    with pytest.raises(Rejected) as caught:
        journal.mark(bytes(32), "values")
    assert caught.value.cause == "replay" and len(held) == 1


def test_a_journal_that_cannot_be_written_lets_no_answer_out(make_run, tmp_path):
    run = make_run(4)
    clients, server = run.drive(until="keys")
    other = run.client("client-0", journal=Journal(tmp_path / "no" / "journal"))
    other.load_state_bytes(clients["client-0"].state_bytes())
    with pytest.raises(InputError, match="journal"):
        other.share_keys(server.roster())


def test_a_mark_behind_half_a_line_is_found_again(tmp_path):
    """As a full disk or a power cut leaves it: what is written next must stand on its own."""
    path = tmp_path / "journal"
    path.write_bytes(b"ab12 shar")
    Journal(path).mark(32 * b"a", "shares")
    with pytest.raises(Rejected, match="second time"):
        Journal(path).mark(32 * b"a", "shares")


@pytest.mark.parametrize("until", ["inbox", "values", "agreement", "answers"])
def test_a_client_without_a_journal_takes_no_earlier_state_of_its_round_back(make_run, until):
    run = make_run(4)
    clients, server = run.drive(until="shares")
    client = clients["client-0"]
    early = client.state_bytes()
    for name, each in clients.items():
        each.take_shares(server.inbox(name))
    earlier = client.state_bytes()
    if until != "inbox":
        for name, each in clients.items():
            server.add_masked(each.mask(run.update(name)))
        survivors = server.survivors()
    if until in ("agreement", "answers"):
        for each in clients.values():
            server.add_agreement(each.agree(survivors))
        agreements = server.agreements()
    if until == "answers":
        client.answer(agreements)
    for state in (early, *([earlier] if until != "inbox" else ())):
        with pytest.raises(Rejected, match=r"a state of the phase of (shares|values) after"):
            client.load_state_bytes(state)
    now = client.state_bytes()
    client.load_state_bytes(now)  # the same one is no step back
    after = run.client("client-0", last=client.last)
    after.load_state_bytes(now)
    assert after.state_bytes() and after.last == client.last


def played(run, journal):
    """A round of a client with a journal, and its state before each of its answers."""
    name, states = "client-0", {}
    clients = {c: run.client(c, journal=journal if c == name else None) for c in run.names}
    server = run.server()
    acts = {"keys": lambda x, c: x.start_round(5, weight=run.weights[c], base="v1")}

    def play(phase, act, add):
        acts[phase] = act
        for c, client in clients.items():
            if c == name and phase != "keys":
                states[phase] = client.state_bytes()
            add(act(client, c))

    play("keys", acts["keys"], server.add_keys)
    roster = server.roster()
    play("shares", lambda x, _: x.share_keys(roster), server.add_shares)
    for c, client in clients.items():
        client.take_shares(server.inbox(c))
    play("values", lambda x, c: x.mask(run.update(c)), server.add_masked)
    survivors = server.survivors()
    play("agreement", lambda x, _: x.agree(survivors), server.add_agreement)
    agreements = server.agreements()
    play("answers", lambda x, _: x.answer(agreements), server.add_answer)
    assert server.mean()
    return clients[name], states, acts


def test_no_state_of_a_round_answers_again_once_the_journal_has_dropped_its_marks(
    make_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(journal_module, "_KEPT", 4)
    run, journal = make_run(3), Journal(tmp_path / "journal")
    client, states, acts = played(run, journal)
    marks, text = 4, journal.path.read_text()
    assert len(text.splitlines()) == 1 + marks
    for number in range(6, 6 + 2 * 4):
        client.start_round(number, base="v1")
        for phase, state in states.items():
            before = run.client("client-0", journal=journal)
            before.load_state_bytes(state)
            with pytest.raises(Rejected) as caught:
                acts[phase](before, "client-0")
            assert caught.value.cause == "replay", phase
    assert not {*text.splitlines()} & {*journal.path.read_text().splitlines()}


def test_a_journal_does_not_grow_with_the_rounds_and_knows_those_it_looks_after(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(journal_module, "_KEPT", 4)
    journal, sizes = Journal(tmp_path / "journal"), []
    for number in range(1, 19):
        assert journal.begin() == number
        for phase in ("shares", "values", "agreement", "answers"):
            journal.mark(bytes([number]) * 32, phase, begun=number)
        for earlier in {1, number - 4, number - 3, number} - {*range(-4, 1)}:
            with pytest.raises(Rejected) as caught:
                journal.mark(bytes([earlier]) * 32, "values", begun=earlier)
            assert caught.value.cause == "replay"
        sizes.append(len(journal.path.read_bytes()))
    assert max(sizes[8:]) <= max(sizes[:8]) + 8 * 5  # numbers of two digits
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [journal.path]


def test_runs_at_once_with_one_journal_go_on_and_a_new_run_begins_at_any_number(make_run, tmp_path):
    run, journal = make_run(3), Journal(tmp_path / "journal")
    for _ in range(2):  # each of a state of its own, as Flower's runs have
        client, _, _ = played(run, journal)
        assert client.last == 5
    first, second = (run.client("client-0", journal=journal) for _ in range(2))
    others = {c: run.client(c) for c in run.names[1:]}
    server = run.server()
    for client in (first, *others.values()):
        server.add_keys(client.start_round(5, weight=1.0, base="v1"))
    second.start_round(1, weight=1.0, base="v1")
    assert first.share_keys(server.roster())


def test_a_process_that_waits_while_another_shrinks_the_journal_marks_the_new_file(
    tmp_path, monkeypatch
):
    """What it opened before is no longer the journal."""
    monkeypatch.setattr(journal_module, "_KEPT", 1)
    journal, lock = Journal(tmp_path / "journal"), fcntl.flock
    journal.mark(bytes(32), "shares")

    def waiting(file, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        assert journal.begin() == 1
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", waiting)
    journal.mark(bytes(32), "values")
    for phase in ("shares", "values"):
        with pytest.raises(Rejected):
            journal.mark(bytes(32), phase)


def test_a_journal_behind_a_link_shrinks_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "_KEPT", 1)
    (tmp_path / "link").symlink_to(tmp_path / "journal")
    journal = Journal(tmp_path / "link")
    journal.begin()
    assert journal.path.is_symlink() and (tmp_path / "journal").read_text() == "1 begun\n"


def test_a_round_that_an_older_release_began_is_marked_for_good(make_run, tmp_path, monkeypatch):
    """Its state has no number of the journal's, and its marks are never dropped."""
    monkeypatch.setattr(journal_module, "_KEPT", 2)
    run, journal = make_run(3), Journal(tmp_path / "journal")
    clients, server = run.drive(until="keys")
    every = dataclasses.fields
    monkeypatch.setattr(resting, "fields", lambda now: [f for f in every(now) if f.name != "begun"])
    state = clients["client-0"].state_bytes()
    older = run.client("client-0", journal=journal)
    older.load_state_bytes(state)
    older.share_keys(server.roster())
    for _ in range(6):
        journal.begin()
    again = run.client("client-0", journal=journal)
    again.load_state_bytes(state)
    with pytest.raises(Rejected, match="second time"):
        again.share_keys(server.roster())
