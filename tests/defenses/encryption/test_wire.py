"""What an adversary can do to messages: none is accepted silently, none crashes the process."""

import random
import struct

import pytest
import torch

from vitguard.defenses.encryption import Decryptor, Encryptor, KeySet, Manifest
from vitguard.defenses.encryption.wire import _FIXED
from vitguard.errors import Rejected

FIELDS = {  # offset of each header field
    "magic": 0, "version": 4, "kind": 5, "preset": 6, "key": 18, "manifest": 34, "round": 66,
    "base": 74, "nonce": 106, "max_clients": 122, "clients": 124, "weight": 126, "values": 134,
    "count": 142, "id_size": 146, "id": 147, "table": 148,
}  # fmt: skip


def cause(call, *arguments, **settings):
    with pytest.raises(Rejected) as caught:
        call(*arguments, **settings)
    assert str(caught.value).startswith("Expected an encrypted message that holds, got ")
    return caught.value.cause


def reordered(data):
    """The same message with its first two ciphertexts in the other order."""
    data = bytearray(data)
    count = struct.unpack_from(">I", data, FIELDS["count"])[0]
    at = FIELDS["id"] + data[FIELDS["id_size"]]
    first, second = struct.unpack_from(">II", data, at)
    start = at + 4 * count
    middle, end = start + first, start + first + second
    data[start:end] = data[middle:end] + data[start:middle]
    struct.pack_into(">II", data, at, second, first)
    return data


def mutate(message, chance, messages):
    """One random change: flip, cut, insert, repeat, swap, zero, join, reorder."""
    data = bytearray(message)
    kind = chance.randrange(9)
    at, other = sorted((chance.randrange(len(data)), chance.randrange(len(data))))
    if kind == 0:
        for _ in range(chance.choice((1, 1, 1, 2, 20))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = chance.randbytes(chance.choice((1, 4, 100)))
    elif kind == 3:
        data[at:other] = bytes(other - at)
    elif kind == 4:
        data[at:other] = data[at:other] * 2
    elif kind == 5:
        data = bytearray(chance.randbytes(chance.randrange(300)))
    elif kind == 6:
        donor = chance.choice(messages)
        data[at:other] = donor[at:other]
    elif kind == 7:  # a header field at random
        at = chance.choice(list(FIELDS.values()))
        size = chance.choice((1, 2, 4, 8))
        data[at : at + size] = chance.randbytes(size)
    else:
        data = reordered(data)
    return bytes(data)


def mutations(run, total, seed):
    chance = random.Random(seed)
    honest = run.message("a")
    others = [run.message("a", seed=1), run.message("b", seed=2), run.message("a", round_id=6)]
    aggregator = run.aggregator()
    aggregator.add(run.message("z", seed=9))
    causes = {}
    done = 0
    while done < total:
        forged = mutate(honest, chance, others)
        if forged in (honest, *others):
            continue
        found = cause(aggregator.add, forged)
        causes[found] = causes.get(found, 0) + 1
        done += 1
    assert aggregator.clients == ("z",)
    aggregator.add(honest)
    mean = Decryptor(run.keys, run.manifest).decrypt(aggregator.finish(), round_id=5, base="v1")
    expected = (run.tensors(0)["w"] + run.tensors(9)["w"]) / 2
    assert (mean["w"] - expected).abs().max() < 1e-4
    return causes


@pytest.mark.slow
def test_10000_mutations_of_a_message_are_refused_and_leave_the_sum_as_it_was(run):
    causes = mutations(run, 10_000, seed=1)
    assert len(causes) >= 8, causes


def insiders(run, total, seed):
    """Mutations inside the ciphertexts, authenticated afterwards: they reach SEAL."""
    chance = random.Random(seed)
    honest = run.message("a")
    count = struct.unpack_from(">I", honest, FIELDS["count"])[0]
    start = FIELDS["table"] + 4 * count
    caught = {"add": 0, "decrypt": 0, "harmless": 0}
    for _ in range(total):
        data = bytearray(honest)
        if chance.random() < 0.3:  # near the start of a ciphertext: SEAL's and zstd's own headers
            at = start + chance.randrange(120)
        else:
            at = chance.randrange(start, len(data) - 32)
        size = chance.choice((1, 1, 8, 64))
        data[at : at + size] = chance.randbytes(size)
        if bytes(data) == honest:
            continue
        aggregator = run.aggregator()
        aggregator.add(run.message("b", seed=3))
        try:
            aggregator.add(run.prove(data[: len(honest)]))
        except Rejected:
            caught["add"] += 1
            continue
        try:
            mean = Decryptor(run.keys, run.manifest).decrypt(
                aggregator.finish(), round_id=5, base="v1"
            )
        except Rejected as refused:
            assert refused.cause in ("canary", "range")
            caught["decrypt"] += 1
        else:  # bytes that mean the same ciphertext, such as those of a version number
            wanted = (run.tensors(0)["w"] + run.tensors(3)["w"]) / 2
            assert (mean["w"] - wanted).abs().max() < 1e-4
            caught["harmless"] += 1
    return caught


@pytest.mark.slow
def test_60_forged_ciphertexts_of_an_insider_are_refused_by_seal_or_the_canary(run):
    caught = insiders(run, 60, seed=0)
    assert caught["add"] and caught["decrypt"], caught


@pytest.mark.slow
def test_1000_forged_ciphertexts_of_an_insider_are_refused_by_seal_or_the_canary(run):
    caught = insiders(run, 1000, seed=1)
    assert caught["harmless"] < 20, caught


def test_the_header_layout_is_the_one_these_tests_know(run):
    message = run.message("a")
    assert _FIXED.size == FIELDS["id"] and message[FIELDS["id"] : FIELDS["table"]] == b"a"


@pytest.mark.parametrize(
    "field, cause_of_it",
    [
        ("magic", "magic"), ("version", "version"), ("kind", "kind"), ("preset", "preset"),
        ("key", "key"), ("manifest", "code"), ("round", "code"), ("base", "code"),
        ("nonce", "code"), ("max_clients", "code"), ("clients", "code"), ("weight", "code"),
        ("values", "code"), ("count", "counts"), ("id", "code"), ("table", "code"),
    ],
)  # fmt: skip
def test_a_flipped_header_field_is_refused(run, field, cause_of_it):
    data = bytearray(run.message())
    data[FIELDS[field]] ^= 1
    assert cause(run.aggregator().add, bytes(data)) == cause_of_it


@pytest.mark.parametrize(
    "field, value, cause_of_it",
    [
        ("manifest", b"\0" * 32, "manifest"), ("round", struct.pack(">Q", 6), "round"),
        ("base", b"\0" * 32, "base"), ("max_clients", struct.pack(">H", 100), "clients"),
        ("clients", struct.pack(">H", 7), "clients"), ("clients", b"\0\0", "clients"),
        ("weight", struct.pack(">d", float("nan")), "weight"),
        ("weight", struct.pack(">d", 1e9), "weight"), ("weight", struct.pack(">d", -1.0), "weight"),
        ("values", struct.pack(">Q", 2**63), "manifest"),
        ("table", struct.pack(">I", 2**32 - 1), "counts"),
        ("table", b"\0" * 8, "counts"),
    ],
)  # fmt: skip
def test_a_forged_header_field_is_refused_though_authenticated(run, field, value, cause_of_it):
    data = bytearray(run.message())
    data[FIELDS[field] : FIELDS[field] + len(value)] = value
    assert cause(run.aggregator().add, run.prove(data)) == cause_of_it


def test_a_replayed_message_is_refused_in_its_round_and_in_another(run):
    aggregator, message = run.aggregator(), run.message()
    aggregator.add(message)
    assert cause(aggregator.add, message) == "replay"
    assert cause(aggregator.add, run.message(seed=4)) == "replay"
    assert cause(run.aggregator(round_id=6).add, message) == "round"


def test_another_version_of_the_public_model_is_refused(run):
    assert cause(run.aggregator(base="v2").add, run.message(base="v1")) == "base"


def test_a_wrong_key_is_refused(run):
    stranger = KeySet.generate()
    assert cause(run.aggregator().add, run.message(keys=stranger)) == "key"
    assert cause(run.aggregator().add, run.message(keys=run.keys.rotate())) == "key"


def test_a_client_cannot_send_as_another(run):
    keys = run.keys.for_client("a")
    run.aggregator().add(run.message("a", keys=keys))
    assert cause(run.message, "b", keys=keys) == "key"
    message = bytearray(run.message("a", keys=keys))
    message[FIELDS["id"]] = ord("b")
    assert cause(run.aggregator().add, bytes(message)) == "code"


def test_a_swapped_manifest_is_refused(run):
    wider = Manifest.of(run.template, bounds=2.0, max_weight=4.0)
    aggregator = run.aggregator(manifest=wider)
    assert cause(aggregator.add, run.message()) == "manifest"


def test_an_oversize_message_is_refused_before_it_is_read(run):
    message = run.message()
    assert cause(run.aggregator().add, message + bytes(10**7)) == "oversize"


@pytest.mark.parametrize("thing", [b"", b"VGHE", None, "text", 7, [1], b"\x08\x01" * 400])
def test_things_that_are_no_message_are_refused(run, thing):
    assert cause(run.aggregator().add, thing) in ("type", "truncated", "magic")


def test_a_crafted_protobuf_is_refused(run):
    ts = pytest.importorskip("tenseal")
    context = ts.context(ts.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[54, 20])
    context.global_scale = 2**13
    vector = ts.ckks_vector(context, [1.0] * 100).serialize()
    assert cause(run.aggregator().add, vector) in ("magic", "truncated")
    data = run.message()
    count = struct.unpack_from(">I", data, FIELDS["count"])[0]
    lengths = [len(vector), *[100] * (count - 1)]
    body = data[: FIELDS["table"]] + struct.pack(f">{count}I", *lengths) + vector
    forged = run.prove(body + bytes(100 * (count - 1)) + bytes(32))
    assert cause(run.aggregator().add, forged) in ("ciphertext", "oversize")


def test_a_message_is_no_sum_and_a_sum_is_no_message(run):
    total = run.sum()
    assert cause(run.aggregator().add, total) == "kind"
    decryptor = Decryptor(run.keys, run.manifest)
    assert cause(decryptor.decrypt, run.message(), round_id=5, base="v1") == "kind"


def test_200_mutations_of_a_sum_are_refused(run):
    chance, total = random.Random(2), run.sum()
    others = [run.sum(2)]
    decryptor = Decryptor(run.keys, run.manifest)
    for _ in range(200):
        forged = mutate(total, chance, others)
        if forged in (total, *others):
            continue
        cause(decryptor.decrypt, forged, round_id=5, base="v1")
    assert decryptor.decrypt(total, round_id=5, base="v1")


def test_a_sum_of_other_messages_than_it_says_is_refused(run):
    data = bytearray(run.sum(3))
    data[FIELDS["clients"] : FIELDS["clients"] + 2] = struct.pack(">H", 4)
    decryptor = Decryptor(run.keys, run.manifest)
    forged = run.sign(data)
    assert cause(decryptor.decrypt, forged, round_id=5, base="v1") == "canary"
    assert cause(decryptor.decrypt, run.sum(3), round_id=5, base="v1") == "replay"  # it was signed
    assert run.open(run.sum(3))["w"].shape == (9000,)


def test_the_canary_shows_a_wrong_secret_key_under_the_right_name(run):
    stranger = KeySet.generate()
    impostor = KeySet(
        run.keys._facts, stranger._KeySet__secret, run.keys.authority, run.keys.server
    )
    total = run.sum()
    decryptor = Decryptor(impostor, run.manifest)
    assert cause(decryptor.decrypt, total, round_id=5, base="v1") == "canary"


def test_reordered_ciphertexts_show_in_the_canary_even_when_authenticated(run):
    forged = run.sign(reordered(run.sum(2)))
    decryptor = Decryptor(run.keys, run.manifest)
    assert cause(decryptor.decrypt, forged, round_id=5, base="v1") == "canary"


def test_a_round_is_opened_once_and_rounds_go_forward(run):
    decryptor = Decryptor(run.keys, run.manifest)
    decryptor.decrypt(run.sum(3), round_id=5, base="v1")
    assert cause(decryptor.decrypt, run.sum(2), round_id=5, base="v1") == "replay"
    assert cause(decryptor.decrypt, run.sum(2), round_id=7, base="v1") == "round"


def test_too_few_clients_are_refused_by_the_server_and_by_the_client(run):
    aggregator = run.aggregator()
    aggregator.add(run.message("a"))
    assert cause(aggregator.finish) == "clients"
    with pytest.raises(ValueError, match="at least 2"):
        aggregator.finish(min_clients=1)
    decryptor = Decryptor(run.keys, run.manifest, min_clients=4)
    assert cause(decryptor.decrypt, run.sum(3), round_id=5, base="v1") == "clients"


def test_nothing_is_added_after_the_sum_was_given_out(run):
    aggregator = run.aggregator()
    for name in "ab":
        aggregator.add(run.message(name))
    total = aggregator.finish()
    assert cause(aggregator.add, run.message("c")) == "replay"
    assert aggregator.finish() == total


def test_more_clients_than_the_sum_can_hold_are_refused(make_run):
    run = make_run(values=10, max_clients=2)
    aggregator = run.aggregator()
    for name in "ab":
        aggregator.add(run.message(name))
    assert cause(aggregator.add, run.message("c")) == "clients"


def test_a_changed_model_is_refused_by_the_manifest(run):
    encryptor = Encryptor(run.keys, run.manifest, client_id="a")
    tensors = run.tensors()
    assert cause(encryptor.encrypt, {**tensors, "w": torch.zeros(9001)}, round_id=0) == "manifest"
    assert cause(encryptor.encrypt, {"w": tensors["w"]}, round_id=0) == "manifest"
    integers = {**tensors, "b": torch.zeros(3, 2, dtype=torch.int64)}
    assert cause(encryptor.encrypt, integers, round_id=0) == "manifest"


@pytest.mark.parametrize("first", [True, False])
def test_a_message_whose_second_ciphertext_is_bad_leaves_the_sum_as_it_was(run, first):
    aggregator = run.aggregator()
    if not first:
        aggregator.add(run.message("z", seed=9))
    data = bytearray(run.message("a"))
    length = struct.unpack_from(">I", data, FIELDS["table"])[0]
    at = FIELDS["table"] + 8 + length  # two ciphertexts: the second one's start
    data[at : at + 3] = b"bad"
    assert cause(aggregator.add, run.prove(data)) == "ciphertext"
    for client, seed in (("b", 1), ("c", 2)):
        aggregator.add(run.message(client, seed=seed))
    mean = Decryptor(run.keys, run.manifest).decrypt(aggregator.finish(), round_id=5, base="v1")
    seeds = (1, 2) if first else (9, 1, 2)
    wanted = sum(run.tensors(s)["w"] for s in seeds) / len(seeds)
    assert (mean["w"] - wanted).abs().max() < 1e-4
