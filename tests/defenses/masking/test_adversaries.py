"""What a dishonest server, or clients beside it, try; and that garbage is refused by its type."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fast import fast_for
from vitguard.defenses.encryption import SigningKey
from vitguard.defenses.masking import MaskingClient, Terms, secret_sharing, wire
from vitguard.errors import InputError, Rejected, Unprotected
from vitguard.testing.messages import mutated

BASE = "v1"


def cause_of(act):
    with pytest.raises(Rejected) as caught:
        act()
    return caught.value.cause


def forged(run, kind, body, *, key=None, sender="server", round_id=5):
    """A message with any body, signed as the server (or `key`) can."""
    content = json.dumps(body).encode() if not isinstance(body, bytes) else body
    binding = run.terms.binding(round_id, BASE)
    return wire.write_message(kind, sender, content, binding, key or run.signing)


def survivors(run, names):
    return forged(run, wire.SURVIVORS, {"survivors": list(names)})


def words(message):
    return np.frombuffer(message[:-64], "<u4", offset=len(message) - 64 - 4 * 306)


def test_a_client_agrees_to_one_set_of_survivors_only(make_run):
    run = make_run(5)
    clients, _ = run.drive(until="values")
    client = clients["client-0"]
    client.agree(survivors(run, run.names))
    assert cause_of(lambda: client.agree(survivors(run, run.names[:4]))) == "phase"
    assert cause_of(lambda: client.agree(survivors(run, run.names))) == "phase"


def test_two_sets_of_survivors_are_never_both_answered(make_run):
    """The server tells half of the clients that one client survived, and half that it did not."""
    run = make_run(5)
    clients, _ = run.drive(until="values")
    told = {c: run.names if n < 3 else run.names[:4] for n, c in enumerate(run.names[:4])}
    signed = {c: clients[c].agree(survivors(run, s)).hex() for c, s in told.items()}
    for client in told:
        mixed = forged(run, wire.AGREEMENTS, signed)
        assert cause_of(lambda c=client, m=mixed: clients[c].answer(m)) == "survivors"
        own = {c: m for c, m in signed.items() if told[c] == told[client]}
        few = forged(run, wire.AGREEMENTS, own)
        assert cause_of(lambda c=client, f=few: clients[c].answer(f)) == "clients"


def test_an_agreement_that_the_server_made_up_is_refused(make_run):
    run = make_run(5)
    clients, _ = run.drive(until="values")
    signed = {c: clients[c].agree(survivors(run, run.names)).hex() for c in run.names[:3]}
    inner = wire.open_message(
        bytes.fromhex(signed["client-0"]), wire.AGREED, run.terms, run.terms.binding(5, BASE)
    )[1]
    false = forged(run, wire.AGREED, inner, sender="client-4")
    signed["client-4"] = false.hex()
    given_out = forged(run, wire.AGREEMENTS, signed)
    assert cause_of(lambda: clients["client-0"].answer(given_out)) == "signature"


def test_of_each_client_a_share_of_one_seed_is_revealed_never_of_both(make_run):
    run = make_run(7)
    answers = []

    def change(phase, name, message):
        if phase == "answers":
            answers.append(message)
        return message

    run.drive(dropouts={"values": ["client-2"]}, change=change)
    assert len(answers) == 6
    for message in answers:
        _, body = wire.open_message(message, wire.ANSWER, run.terms, run.terms.binding(5, BASE))
        shown = json.loads(body)
        assert set(shown["pairs"]) == {"client-2"}
        assert set(shown["own"]) == set(run.names) - {"client-2"}


def test_a_client_answers_once_a_round(make_run):
    run = make_run(4)
    clients, server = run.drive(until="agreement")
    agreements = server.agreements()
    clients["client-0"].answer(agreements)
    assert cause_of(lambda: clients["client-0"].answer(agreements)) == "phase"


def test_survivors_below_the_threshold_strange_or_without_the_client_are_refused(make_run):
    run = make_run(5)
    clients, _ = run.drive(until="values")
    client = clients["client-0"]
    assert cause_of(lambda: client.agree(survivors(run, run.names[:3]))) == "clients"
    assert cause_of(lambda: client.agree(survivors(run, run.names[1:]))) == "client"
    assert cause_of(lambda: client.agree(survivors(run, [*run.names, "ghost"]))) == "client"
    assert cause_of(lambda: client.agree(survivors(run, ["client-0"] * 4))) == "body"


def test_values_leave_once_a_round(make_run):
    run = make_run(4)
    clients, _ = run.drive(until="values")
    with pytest.raises(Unprotected):
        clients["client-0"].mask(run.update("client-1"))


def test_an_old_round_is_not_started_again_nor_are_its_messages_taken(make_run):
    run = make_run(4)
    client = run.client("client-0", last=5)
    assert cause_of(lambda: client.start_round(5, base=BASE)) == "replay"
    assert cause_of(lambda: client.start_round(4, base=BASE)) == "replay"
    old = run.client("client-1").start_round(5, base=BASE)
    assert cause_of(lambda: run.server(6).add_keys(old)) == "round"
    client.start_round(6, base=BASE)
    _, server = run.drive(until="keys")
    assert cause_of(lambda: client.share_keys(server.roster())) == "round"


def test_a_signed_sum_is_opened_once_and_in_its_round_only(make_run):
    run = make_run(3)
    _, server = run.drive()
    total, opener = server.finish(), run.opener()
    assert cause_of(lambda: opener.open(total, round_id=6, base=BASE)) == "round"
    assert cause_of(lambda: opener.open(total, round_id=5, base="other")) == "round"
    opener.open(total, round_id=5, base=BASE)
    assert opener.opened == 5
    assert cause_of(lambda: opener.open(total, round_id=5, base=BASE)) == "replay"
    changed = bytearray(total)
    changed[-80] ^= 1
    assert cause_of(lambda: run.opener().open(changed, round_id=5, base=BASE)) == "signature"


def test_keys_that_the_server_swapped_are_refused(make_run):
    run = make_run(5)
    clients, server = run.drive(until="keys")
    found = {c: m.hex() for c, m in server._keys.items()}
    _, body = wire.open_message(
        server._keys["client-1"], wire.KEYS, run.terms, run.terms.binding(5, BASE)
    )
    own = {**json.loads(body), "pairs": secret_sharing.public_half(
        secret_sharing.Secret(bytes(16)), run.terms.binding(5, BASE)).hex()}  # fmt: skip
    swapped = forged(run, wire.KEYS, own, sender="client-1")
    roster = forged(run, wire.ROSTER, {**found, "client-1": swapped.hex()})
    assert cause_of(lambda: clients["client-0"].share_keys(roster)) == "signature"
    twisted = forged(run, wire.ROSTER, {**found, "client-1": found["client-2"]})
    assert cause_of(lambda: clients["client-0"].share_keys(twisted)) == "key"
    moved = {c: m for c, m in found.items() if c != "client-2"} | {"client-1": found["client-2"]}
    moved = forged(run, wire.ROSTER, moved)
    assert cause_of(lambda: clients["client-0"].share_keys(moved)) == "key"
    without = forged(run, wire.ROSTER, {c: m for c, m in found.items() if c != "client-0"})
    assert cause_of(lambda: clients["client-0"].share_keys(without)) == "key"


def test_keys_of_a_client_that_copies_anothers_are_refused(make_run):
    run = make_run(4)
    clients, server = run.drive(until="keys")
    found = {c: m.hex() for c, m in server._keys.items()}
    _, body = wire.open_message(
        server._keys["client-1"], wire.KEYS, run.terms, run.terms.binding(5, BASE)
    )
    copied = forged(run, wire.KEYS, body, key=run.identities["client-2"], sender="client-2")
    roster = forged(run, wire.ROSTER, {**found, "client-2": copied.hex()})
    assert cause_of(lambda: clients["client-0"].share_keys(roster)) == "key"


def test_a_share_that_was_changed_on_its_way_is_dropped_and_the_sum_is_right(make_run):
    run = make_run(5)

    def change(phase, name, message):
        if phase != "shares" or name != "client-3":
            return message
        _, body = wire.open_message(message, wire.SHARES, run.terms, run.terms.binding(5, BASE))
        shares = json.loads(body)
        first = shares["client-0"]
        shares["client-0"] = ("0" if first[0] != "0" else "1") + first[1:]
        return forged(run, wire.SHARES, shares, key=run.identities[name], sender=name)

    _, server = run.drive(change=change)
    server.finish()
    wanted, mean = run.plain_mean(run.names), server.mean()
    assert (mean["w"] - wanted["w"]).abs().max() <= run.step(run.names)


def lying(run, liars):
    def change(phase, name, message):
        if phase != "answers" or name not in liars:
            return message
        _, body = wire.open_message(message, wire.ANSWER, run.terms, run.terms.binding(5, BASE))
        shown = json.loads(body)
        shown["own"] = {c: "00" * 16 for c in shown["own"]}
        return forged(run, wire.ANSWER, shown, key=run.identities[name], sender=name)

    return change


def test_one_false_share_changes_no_sum_and_too_many_end_the_round(make_run):
    run = make_run(5)
    _, server = run.drive(change=lying(run, {"client-1"}))
    assert (server.mean()["w"] - run.plain_mean(run.names)["w"]).abs().max() < run.step(run.names)
    _, server = run.drive(change=lying(run, {"client-1", "client-2"}))
    assert cause_of(server.finish) == "share"


def chi_square(message):
    counts = np.bincount(np.frombuffer(words(message).tobytes(), np.uint8), minlength=256)
    due = counts.sum() / 256
    return float(((counts - due) ** 2 / due).sum())


def test_masked_values_look_uniform_whatever_the_values_are(make_run):
    """Chi-square of 255 degrees of freedom: mean 255, deviation 22.6."""
    run = make_run(3)
    run.update = lambda name: {k: torch.zeros(t.shape) for k, t in run.template.items()}
    messages = []
    for round_id in range(5, 25):
        clients, _ = run.drive(until="inbox", round_id=round_id)
        messages.append(clients["client-0"].mask(run.update("client-0")))
    mean = sum(map(chi_square, messages)) / len(messages)
    assert abs(mean - 255) < 6 * 22.6 / len(messages) ** 0.5
    ones = np.unpackbits(np.frombuffer(b"".join(words(m).tobytes() for m in messages), np.uint8))
    assert abs(ones.mean() - 0.5) < 6 * 0.5 / len(ones) ** 0.5


def test_the_same_values_twice_give_unrelated_bytes(make_run):
    run = make_run(3)
    first, second = (
        run.drive(until="inbox", round_id=n)[0]["client-0"].mask(run.update("client-0"))
        for n in (5, 6)
    )
    assert (words(first) == words(second)).mean() < 0.02
    difference = (words(first) - words(second)).view(np.int32).astype(float)
    assert np.abs(difference).mean() > 2**29  # unrelated: 2^30 on average; reused: about 1


def unmasked_without(run, clients, messages, known, target):
    """What a server and `known` clients have of the target's values before any answer.

    They take off each pairwise mask that they know and try to rebuild the self-mask's seed.
    """
    binding = run.terms.binding(5, BASE)
    left = words(messages[target]).copy()
    for peer in known:
        now = clients[peer]._round
        key = secret_sharing.pair_key(
            now.pairs, now.roster[target]["pairs"], binding, "pairwise mask"
        )
        secret_sharing.add_mask(left, key, -1 if target < peer else 1)
    shares = {}
    place = {c: n for n, c in enumerate(run.names, 1)}
    for peer in known:
        share = clients[peer]._share_of(clients[peer]._round, target)
        shares[place[peer]] = share.reveal()
    return left, shares


def test_a_server_and_threshold_less_one_clients_do_not_get_one_clients_values(make_run):
    run, messages = make_run(5), {}

    def change(phase, name, message):
        if phase == "values":
            messages[name] = message
        return message

    clients, _ = run.drive(until="values", change=change)
    target, known = "client-0", run.names[1 : run.terms.threshold]
    assert len(known) == run.terms.threshold - 1
    least = run.terms.threshold
    left, shares = unmasked_without(run, clients, messages, known, target)
    plain = run.update(target)["w"].numpy()
    guess = left.view(np.int32)[: len(plain)].astype(float)
    assert abs(np.corrcoef(guess, plain)[0, 1]) < 6 / len(plain) ** 0.5
    binding, keys = run.terms.binding(5, BASE), clients[target]._round.roster[target]
    for kind, make, cut in (
        ("own", secret_sharing.commitment, slice(0, 16)),
        ("pairs", secret_sharing.public_half, slice(16, 32)),
    ):
        some = {n: s[cut] for n, s in shares.items()}
        assert cause_of(
            lambda s=some, k=kind, m=make: secret_sharing.rebuild(s, least, keys[k], binding, m)
        ) == "clients"  # fmt: skip
        assert cause_of(
            lambda s=some, k=kind, m=make: secret_sharing.rebuild(
                s, least - 1, keys[k], binding, m
            )
        ) == "share"  # fmt: skip


def test_self_mask_taken_off_the_masks_with_honest_peers_still_hide_the_values(make_run):
    """A server takes the self-mask off every survivor: that is how it gets the sum."""
    run, messages = make_run(5), {}
    clients, _ = run.drive(until="values", change=lambda p, n, m: messages.setdefault((p, n), m))
    binding, left = run.terms.binding(5, BASE), words(messages["values", "client-0"]).copy()
    plain, now = run.update("client-0")["w"].numpy(), clients["client-0"]._round
    secret_sharing.add_mask(left, secret_sharing.self_key(now.own, binding), -1)
    for peer in run.names[1:]:  # those before the last one work with the server
        guess = left.view(np.int32)[: len(plain)].astype(float)
        assert abs(np.corrcoef(guess, plain)[0, 1]) < 6 / len(plain) ** 0.5
        key = secret_sharing.pair_key(now.pairs, now.roster[peer]["pairs"], binding,
                                      "pairwise mask")  # fmt: skip
        secret_sharing.add_mask(left, key, -1)
    guess = left.view(np.int32)[: len(plain)].astype(float)
    assert np.corrcoef(guess, plain)[0, 1] > 0.999  # the yardstick: all masks off


def test_all_other_clients_masks_known_the_self_mask_still_hides_a_late_message(make_run):
    """The server calls a client dropped, rebuilds its pairwise masks, then gets its values."""
    run, messages = make_run(5), {}
    clients, _ = run.drive(until="values", change=lambda p, n, m: messages.setdefault((p, n), m))
    binding, left = run.terms.binding(5, BASE), words(messages["values", "client-0"]).copy()
    now = clients["client-0"]._round
    for peer in run.names[1:]:
        key = secret_sharing.pair_key(now.pairs, now.roster[peer]["pairs"], binding,
                                      "pairwise mask")  # fmt: skip
        secret_sharing.add_mask(left, key, -1)
    plain = run.update("client-0")["w"].numpy()
    guess = left.view(np.int32)[: len(plain)].astype(float)
    assert abs(np.corrcoef(guess, plain)[0, 1]) < 6 / len(plain) ** 0.5
    secret_sharing.add_mask(left, secret_sharing.self_key(now.own, binding), -1)
    guess = left.view(np.int32)[: len(plain)].astype(float)
    assert np.corrcoef(guess, plain)[0, 1] > 0.999  # the yardstick: all masks off


def test_wrong_shapes_missing_and_integer_tensors_are_refused_before_anything_leaves(make_run):
    run = make_run(3)
    clients, _ = run.drive(until="inbox")
    good = run.update("client-0")
    for wrong in (
        {"w": good["w"]},
        {**good, "w": torch.zeros(299)},
        {**good, "b": torch.zeros(3, 2, dtype=torch.int64)},
    ):
        assert cause_of(lambda w=wrong: clients["client-0"].mask(w)) == "manifest"
    clients["client-0"].mask(good)


def test_values_of_another_number_or_weight_leave_the_sum_as_it_was(make_run):
    run = make_run(3)
    _, server = run.drive(until="inbox")
    key, name = run.identities["client-0"], "client-0"
    for weight, count, cause in (
        (1.0, 305, "counts"), (1e9, 306, "weight"), (-1.0, 306, "weight"), (0.0, 306, "weight"),
        (float("nan"), 306, "weight"),
    ):  # fmt: skip
        body = wire.MASKED_HEAD.pack(weight, 0) + bytes(4 * count)
        message = forged(run, wire.MASKED, body, key=key, sender=name)
        assert cause_of(lambda m=message: server.add_masked(m)) == cause
    assert not server._total.any() and server.clients == ()


def test_a_second_message_or_one_out_of_its_phase_is_refused(make_run):
    run, kept = make_run(3), {}
    _, server = run.drive(until="values", change=lambda p, n, m: kept.setdefault((p, n), m))
    before = server._total.copy()
    assert cause_of(lambda: server.add_masked(kept["values", "client-0"])) == "replay"
    assert cause_of(lambda: server.add_keys(kept["keys", "client-0"])) == "phase"
    assert cause_of(lambda: server.add_masked(kept["shares", "client-0"])) == "kind"
    assert (server._total == before).all()


ROLES = ("add_keys", "add_shares", "add_masked", "add_agreement", "add_answer")


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_garbage_and_mutated_bytes_are_refused_by_their_type(data):
    from tests.defenses.masking.conftest import Run

    global _shared
    run, kept = _shared = globals().get("_shared") or _played(Run)
    message = data.draw(st.sampled_from(sorted(kept.values())))
    cut = data.draw(st.integers(0, len(message) - 1))
    for garbage in (
        data.draw(mutated(message)),
        message[:cut],
        message + b"x",
        data.draw(st.binary(max_size=300)),
    ):
        for role in ROLES:
            with pytest.raises(Rejected):
                getattr(run.server(), role)(bytes(garbage))
        client = run.client("client-0", last=-1)
        client.start_round(5, base=BASE)
        with pytest.raises(Rejected):
            client.share_keys(bytes(garbage))
        with pytest.raises(Rejected):
            run.opener().open(bytes(garbage), round_id=5, base=BASE)


def _played(make):
    run, kept = make(3, values=4), {}
    _, server = run.drive(change=lambda p, n, m: kept.setdefault((p, n), m))
    kept.update({("sum", ""): server.finish(), ("roster", ""): b"VGMA" + bytes(200)})
    return run, kept


BODIES = (
    b"", b"[]", b"{", b"null", b'{"a":1}', b'{"survivors":3}', b'{"survivors":[1,2,3]}', b"\xff",
    b"[" * 3000, b'{"set":"zz"}', b'{"own":[],"pairs":{}}', b'{"own":{},"pairs":{"client-0":1}}',
    b'{"transport":1,"pairs":2,"own":3}', b'{"client-0":{}}', b'{"client-1":"AB"}', b"NaN",
)  # fmt: skip


# of no JSON, JSON of no table, tables of other values; every body at every phase is the slow one
@pytest.mark.parametrize("body", fast_for(BODIES, fast=(*BODIES[2:4], BODIES[7], *BODIES[10:13])))
def test_signed_garbage_is_refused_by_its_type_at_every_phase(make_run, body):
    run = make_run(3, values=4)
    stops = ("keys", "shares", "inbox", "values", "agreement")
    kinds = (wire.KEYS, wire.SHARES, wire.MASKED, wire.AGREED, wire.ANSWER)
    for role, kind in zip(ROLES, kinds, strict=True):
        message = forged(run, kind, body, key=run.identities["client-0"], sender="client-0")
        for stop in stops:
            _, server = run.drive(until=stop)
            if stop == "inbox":
                server._phase = 2
            with pytest.raises(Rejected):
                getattr(server, role)(message)
    for stop, role, kind in (
        ("keys", "share_keys", wire.ROSTER), ("shares", "take_shares", wire.INBOX),
        ("values", "agree", wire.SURVIVORS), ("agreement", "answer", wire.AGREEMENTS),
    ):  # fmt: skip
        clients, _ = run.drive(until=stop)
        with pytest.raises(Rejected):
            getattr(clients["client-0"], role)(forged(run, kind, body))


def test_terms_with_too_few_clients_shared_keys_or_a_low_threshold_are_refused(make_run):
    run = make_run(5)
    keys = {c: k.public_bytes() for c, k in run.identities.items()}
    server = run.signing.public_bytes()
    for identities, threshold in (
        ({c: keys[c] for c in run.names[:2]}, 0), ({**keys, "client-0": keys["client-1"]}, 0),
        ({**keys, "client-0": server}, 0), (keys, 2), (keys, 6), ({**keys, "": server}, 0),
        ({**keys, "client-0": bytes(32)}, 0),
    ):  # fmt: skip
        with pytest.raises(InputError):
            Terms(run.manifest, identities, server, threshold)
    assert Terms(run.manifest, keys, server).threshold == 4
    assert Terms(run.manifest, keys, server).colluding == 2
    with pytest.raises(InputError):
        MaskingClient(run.terms, SigningKey.generate(), client_id="client-0")


def test_secrets_are_in_no_repr_and_no_pickle(make_run):
    run = make_run(3)
    clients, server = run.drive(until="values")
    client = clients["client-0"]
    with pytest.raises(TypeError):
        pickle.dumps(client)
    assert copy.deepcopy(client) is client
    text = repr(client) + repr(client._round) + repr(server) + repr(vars(client))
    for seed in (client._round.own, client._round.pairs, client._round.transport):
        assert seed.reveal().hex() not in text and repr(seed.reveal()) not in text
