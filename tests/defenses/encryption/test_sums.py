"""What an adversary can do to a sum: add what cancels, sign it, open it twice, leave its bounds."""

import struct
import threading

import numpy as np
import pytest
import torch

from vitguard.defenses.encryption import Aggregator, Decryptor, Encryptor, KeySet, SigningKey
from vitguard.defenses.encryption.packing import canary, pack
from vitguard.defenses.encryption.wire import Context
from vitguard.errors import InputError, Rejected

TABLE = 148  # offset of the table of lengths, in a message of a client with a name of one letter


def parts_of(message, proof=32):
    """Header, and the ciphertexts of a message."""
    count = struct.unpack_from(">I", message, 142)[0]
    table = 147 + message[146]
    lengths = struct.unpack_from(f">{count}I", message, table)
    ciphertexts, at = [], table + 4 * count
    for length in lengths:
        ciphertexts.append(bytes(message[at : at + length]))
        at += length
    assert at + proof == len(message)
    return bytes(message[:table]), ciphertexts


def with_parts(message, ciphertexts, proof=32):
    """The message with other ciphertexts; its proof is to be made again."""
    head, _ = parts_of(message, proof)
    table = struct.pack(f">{len(ciphertexts)}I", *map(len, ciphertexts))
    return head + table + b"".join(ciphertexts) + bytes(proof)


def negative(engine, data):
    """A ciphertext's negative, written out as SEAL does."""
    cipher = engine.load(data, seeded=True)
    engine._evaluator.negate_inplace(cipher)
    return engine.save(cipher)


def transparent(engine, slots):
    """A ciphertext with c1 = 0 that carries `slots`: it needs no key to make or to read."""
    key = engine.new_secret()
    nothing = engine.load(
        engine.encrypt(engine.encryptor(key), np.zeros(len(slots), complex)), seeded=True
    )
    evaluator = engine._evaluator
    try:
        evaluator.sub_inplace(nothing, nothing)
    except RuntimeError:  # SEAL looks after it subtracted
        assert nothing.is_transparent()
    plain = engine._seal.Plaintext()
    engine._coder.encode(slots.tolist(), engine.layout.scale, plain)
    try:
        evaluator.add_plain_inplace(nothing, plain)
    except RuntimeError:
        assert nothing.is_transparent()
    return engine.save(nothing)


def weighted(run, *seeds):
    return sum(run.tensors(s)["w"] for s in seeds) / len(seeds)


def test_a_message_that_is_the_negative_of_another_is_refused_and_the_sum_stays_as_it_was(run):
    aggregator = run.aggregator()
    honest = run.message("a", seed=0)
    aggregator.add(honest)
    engine = aggregator._engine
    _, parts = parts_of(honest)
    cancelling = [negative(engine, p) for p in parts]
    for number in range(len(parts)):  # the first, a later one, and all of them
        forged = [*parts_of(run.message("b", seed=1))[1]]
        forged[number] = cancelling[number]
        with pytest.raises(Rejected):
            aggregator.add(run.prove(with_parts(run.message("b"), forged)))
    with pytest.raises(Rejected):
        aggregator.add(run.prove(with_parts(run.message("b"), cancelling)))
    aggregator.add(run.message("c", seed=2))
    assert (run.open(aggregator.finish())["w"] - weighted(run, 0, 2)).abs().max() < 1e-4


def test_an_addition_that_seal_refuses_after_it_added_is_undone_exactly(run):
    """At the engine's own door: whatever reaches it, the total keeps its every bit."""
    engine = run.aggregator()._engine
    encryptor = engine.encryptor(run.keys.open(engine))
    data = engine.encrypt(encryptor, np.ones(engine.layout.slots, complex))
    total, opposite = engine.load(data, seeded=True), engine.load(data, seeded=True)
    engine._evaluator.negate_inplace(opposite)
    before = engine.save(total)
    with pytest.raises(Rejected, match="SEAL refused") as caught:
        engine.add(total, opposite)
    assert caught.value.cause == "ciphertext"
    assert engine.save(total) == before


class Refusing:
    """SEAL's evaluator or ciphertext door, refusing the call number `at` after it did its work."""

    def __init__(self, real, at, error, after=True):
        self.real, self.left, self.error, self.after = real, at, error, after

    def __call__(self, *arguments, **options):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        result = self.real(*arguments, **options)
        if self.left == 0:
            raise self.error
        return result


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("door", ["load", "add"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_message_refused_at_any_ciphertext_leaves_the_sum_bit_for_bit(
    run, monkeypatch, first, door, at
):
    if first and door == "add":
        pytest.skip("nothing is added to an empty sum")
    aggregator = run.aggregator()
    if not first:
        aggregator.add(run.message("z", seed=9))
    before = [aggregator._engine.save(c) for c in aggregator._total]
    engine = aggregator._engine
    with monkeypatch.context() as patch:
        refusal = Refusing(getattr(engine, door), at, Rejected("test", "this"), after=False)
        patch.setattr(engine, door, refusal)
        with pytest.raises(Rejected):
            aggregator.add(run.message("a"))
    assert [aggregator._engine.save(c) for c in aggregator._total] == before
    aggregator.add(run.message("b", seed=1))
    aggregator.add(run.message("c", seed=2))
    seeds = (1, 2) if first else (9, 1, 2)
    assert (run.open(aggregator.finish())["w"] - weighted(run, *seeds)).abs().max() < 1e-4


def test_an_addition_that_is_broken_off_ends_the_sum_rather_than_falsify_it(run, monkeypatch):
    aggregator = run.aggregator()
    aggregator.add(run.message("a"))
    engine = aggregator._engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "add", Refusing(engine.add, 2, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            aggregator.add(run.message("b"))
    for call in (lambda: aggregator.add(run.message("c")), aggregator.finish):
        with pytest.raises(Rejected, match="broken off") as caught:
            call()
        assert caught.value.cause == "broken"


def test_an_addition_that_is_broken_off_before_its_client_is_counted_ends_the_sum(run, monkeypatch):
    for clients in ("", "a"):
        aggregator = run.aggregator()
        for client in clients:
            aggregator.add(run.message(client))
        with monkeypatch.context() as patch:
            patch.setattr(
                aggregator, "_included", Refusing(aggregator._included, 1, KeyboardInterrupt())
            )
            with pytest.raises(KeyboardInterrupt):
                aggregator.add(run.message("b"))
        with pytest.raises(Rejected, match="broken off"):
            aggregator.add(run.message("c"))


def test_a_sum_that_seal_cannot_write_is_refused_and_can_be_asked_for_again(run, monkeypatch):
    aggregator = run.aggregator()
    for client, seed in (("a", 0), ("b", 1)):
        aggregator.add(run.message(client, seed=seed))
    engine = aggregator._engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_save", Refusing(engine._save, 2, RuntimeError("disk")))
        with pytest.raises(Rejected, match="SEAL refused"):
            aggregator.finish()
    assert (run.open(aggregator.finish())["w"] - weighted(run, 0, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("error", [RuntimeError, ValueError, IndexError, MemoryError, OSError])
def test_every_exception_of_seal_is_rejected_at_every_door(run, monkeypatch, error):
    engine = run.aggregator()._engine
    key = run.keys.open(engine)
    slots = np.ones(engine.layout.slots, complex)
    data = engine.encrypt(engine.encryptor(key), slots)
    cipher = engine.load(data, seeded=True)

    class Broken:
        def __getattr__(self, name):
            def refuse(*arguments):
                raise error("inside SEAL")

            return refuse

    for attribute, call in (
        ("_evaluator", lambda: engine.add(cipher, engine.load(data, seeded=True))),
        ("_evaluator", lambda: engine.subtract(cipher, cipher)),
        ("_coder", lambda: engine.encrypt(engine.encryptor(key), slots)),
        ("_coder", lambda: engine.decrypt(engine.decryptor(key), cipher)),
        ("_slot", lambda: engine.load(data, seeded=True)),
        ("_slot", lambda: engine.save(cipher)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(engine, attribute, Broken())
            with pytest.raises(Rejected, match="SEAL refused"):
                call()
    for call in (
        lambda: engine.encrypt(Broken(), slots),
        lambda: engine.decrypt(Broken(), cipher),
    ):
        with pytest.raises(Rejected, match="SEAL refused"):
            call()


def test_a_ciphertext_that_needs_no_key_is_refused_from_a_client_and_in_a_sum(run):
    aggregator = run.aggregator()
    engine, keys = aggregator._engine, run.keys
    context = Context(keys, run.manifest, 5, "v1")
    ones = np.ones(engine.layout.values)
    made = [
        transparent(engine, pack(ones, keys.layout, canary(context.binding(), n, keys.layout)))
        for n in range(2)
    ]
    with pytest.raises(Rejected) as caught:
        aggregator.add(run.prove(with_parts(run.message("a"), made)))
    assert caught.value.cause == "ciphertext"
    twice = [
        transparent(
            engine, pack(2 * ones, keys.layout, 2 * canary(context.binding(), n, keys.layout))
        )
        for n in range(2)
    ]
    with pytest.raises(Rejected, match="anyone can read and make"):
        run.open(run.sign(with_parts(run.sum(2), twice, 64)))


def test_a_client_s_message_is_fresh_and_a_sum_is_written_out(run):
    """A client cannot send what it computed from others' ciphertexts."""
    aggregator = run.aggregator()
    engine = aggregator._engine
    _, parts = parts_of(run.message("a"))
    written = [engine.save(engine.load(p, seeded=True)) for p in parts]
    with pytest.raises(Rejected, match="another size"):
        aggregator.add(run.prove(with_parts(run.message("a"), written)))
    with pytest.raises(Rejected, match="another size"):
        run.open(run.sign(with_parts(run.sum(2), parts, 64)))


def test_no_client_can_make_a_sum_that_the_others_open(run):
    """Neither with its own keys, nor with those of all clients, nor with another server's."""
    total = run.sum(2)
    stranger = SigningKey.generate()
    body = total[:-64]
    import hashlib

    digest = hashlib.sha256(body).digest()
    for keys in (run.keys, run.keys.for_client("server"), run.keys.for_client("a")):
        for sender in ("server", "a"):
            try:
                code = keys.authority.code(sender, digest)
            except Rejected:
                continue
            for proof in (code + code, code + bytes(32)):
                with pytest.raises(Rejected) as caught:
                    run.open(body + proof)
                assert caught.value.cause == "signature"
    with pytest.raises(Rejected) as caught:
        run.open(body + stranger.sign(digest))
    assert caught.value.cause == "signature"
    assert run.open(total)


def test_a_sum_without_a_known_server_is_opened_by_nobody(run):
    keys = KeySet.generate()
    with pytest.raises(InputError, match="trusting"):
        Decryptor(keys, run.manifest)
    with pytest.raises(InputError, match="its signing key"):
        keys.trusting(run.signing)
    for other in (b"", b"x" * 31, "x" * 32, None):
        with pytest.raises(InputError, match="verification key"):
            keys.trusting(other)
    assert Decryptor(keys.trusting(run.signing.public_bytes()), run.manifest)


def test_an_aggregator_needs_the_server_s_own_keys(run):
    for keys, signing in ((run.keys, run.signing), (run.keys.for_server(), run.keys)):
        with pytest.raises(InputError):
            Aggregator(keys, run.manifest, signing=signing, round_id=0)


def test_a_round_is_opened_once_whatever_threads_do(run):
    """Two sums of one round that differ by a client give that client's update away."""
    first, second = run.sum(3), run.sum(2)
    for _ in range(5):
        decryptor = run.decryptor()
        inside, results = threading.Barrier(2, timeout=600), []

        def attempt(total, decryptor=decryptor, inside=inside, results=results):
            inside.wait()
            try:
                results.append(run.open(total, decryptor))
            except Rejected as refused:
                assert refused.cause == "replay"

        threads = [threading.Thread(target=attempt, args=(t,)) for t in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 1


def test_a_round_is_marked_before_it_is_decrypted(run, monkeypatch):
    """The second opening comes while the first is still decrypting: no luck is needed."""
    decryptor = run.decryptor()
    first, second, causes = run.sum(3), run.sum(2), []
    engine = decryptor._engine
    real = engine.decrypt

    def decrypt(opener, cipher):
        if not causes:
            causes.append("asked")
            try:
                run.open(second, decryptor)
                causes.append("opened")
            except Rejected as refused:
                causes.append(refused.cause)
        return real(opener, cipher)

    monkeypatch.setattr(engine, "decrypt", decrypt)
    assert run.open(first, decryptor)
    assert causes == ["asked", "replay"]


def test_a_forged_sum_does_not_use_up_its_round_and_a_signed_one_does(run):
    decryptor, total = run.decryptor(), run.sum(3)
    for at in (70, 110, 130, len(total) // 2, len(total) - 1):
        forged = bytearray(total)
        forged[at] ^= 1
        with pytest.raises(Rejected):
            run.open(bytes(forged), decryptor)
        assert decryptor.opened == -1
    wrong = bytearray(total)
    wrong[124:126] = struct.pack(">H", 4)
    with pytest.raises(Rejected) as caught:
        run.open(run.sign(wrong), decryptor)
    assert caught.value.cause == "canary" and decryptor.opened == 5
    with pytest.raises(Rejected) as caught:
        run.open(total, decryptor)
    assert caught.value.cause == "replay"


def test_the_last_opened_round_survives_a_restart(run):
    decryptor = run.decryptor()
    run.open(run.sum(3), decryptor)
    again = run.decryptor(opened=decryptor.opened)
    with pytest.raises(Rejected) as caught:
        run.open(run.sum(2), again)
    assert caught.value.cause == "replay"
    assert run.open(run.sum(2), run.decryptor(opened=4))
    for wrong in (-2, 1.5, True, None, "5"):
        with pytest.raises(InputError, match="last round opened"):
            run.decryptor(opened=wrong)


def test_messages_of_an_earlier_run_with_the_same_keys_are_refused(run):
    second = run.manifest.new_run()
    assert second.entries == run.manifest.entries and second.run != run.manifest.run
    with pytest.raises(Rejected, match="another run") as caught:
        run.aggregator(manifest=second).add(run.message())
    assert caught.value.cause == "manifest"
    with pytest.raises(Rejected) as caught:
        Decryptor(run.keys, second).decrypt(run.sum(), round_id=5, base="v1")
    assert caught.value.cause == "manifest"


def integers_of(run, amounts, weight=1.0, canary_of=1):
    """An insider's message with these integers, which no Encryptor would send."""
    keys, manifest = run.keys, run.manifest
    context = Context(keys, manifest, 5, "v1")
    engine = run.aggregator()._engine
    sealer = engine.encryptor(keys.open(engine))
    parts = []
    for number in range(keys.layout.chunks(manifest.values)):
        mark = canary_of * canary(context.binding(), number, keys.layout)
        parts.append(engine.encrypt(sealer, pack(amounts, keys.layout, mark)))
    return run.prove(with_parts(run.message("x", weight=weight), parts))


@pytest.mark.parametrize("preset", ["quantised", "many", "precise", "compact"])
@pytest.mark.parametrize("place", [0, 5000])
def test_a_sum_beyond_the_bounds_is_refused_and_nothing_is_returned(make_run, preset, place):
    run = make_run(preset=preset, values=9000)
    levels, clients = run.keys.layout.levels, 2
    limit = levels * clients // 4 + clients  # weights 1 and 1 of 4, each rounding up
    for sign in (1, -1):
        for excess, fine in ((0, True), (1, False), (levels, False)):
            amounts = np.zeros(run.keys.layout.values)
            amounts[place if place < len(amounts) else 7] = sign * (limit + excess)
            aggregator = run.aggregator()
            aggregator.add(integers_of(run, amounts))
            zero = {k: torch.zeros_like(t) for k, t in run.template.items()}
            encryptor = Encryptor(run.keys, run.manifest, client_id="z", rounding="nearest")
            aggregator.add(encryptor.encrypt(zero, round_id=5, base="v1"))
            total = aggregator.finish()
            if fine:
                assert run.open(total)["w"].abs().max() <= 1 + 4 * clients / levels
                continue
            with pytest.raises(Rejected, match="beyond the bounds") as caught:
                run.open(total)
            assert caught.value.cause == "range"


@pytest.mark.parametrize("weight", [2.0**-38, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_honest_sums_at_their_bounds_are_opened_at_every_weight(run, weight, rounding):
    for sign in (1, -1):
        extreme = {k: torch.full_like(t, sign) for k, t in run.template.items()}
        aggregator = run.aggregator()
        for client in "abc":
            encryptor = Encryptor(run.keys, run.manifest, client_id=client, rounding=rounding)
            aggregator.add(encryptor.encrypt(extreme, round_id=5, weight=weight, base="v1"))
        assert run.open(aggregator.finish())["w"].isfinite().all()


def test_a_client_of_many_threads_is_counted_once(run):
    aggregator, causes = run.aggregator(), []
    messages = [run.message("a", seed=s) for s in range(4)]

    def send(message):
        try:
            aggregator.add(message)
        except Rejected as refused:
            causes.append(refused.cause)

    threads = [threading.Thread(target=send, args=(m,)) for m in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert aggregator.clients == ("a",) and causes == ["replay"] * 3
