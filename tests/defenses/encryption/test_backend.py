"""What reaches SEAL, and what SEAL would not survive."""

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import zstandard

from vitguard.defenses.encryption.backend import Engine
from vitguard.defenses.encryption.packing import canary, pack, unpack
from vitguard.defenses.encryption.presets import PRESETS, Preset
from vitguard.errors import InputError, Rejected


@pytest.fixture(scope="module")
def engine():
    return Engine(PRESETS["quantised"].layout(10))


@pytest.fixture(scope="module")
def cipher(engine):
    secret = engine.new_secret()
    return engine.encrypt(engine.encryptor(secret), np.ones(engine.layout.slots, complex))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_within_the_128_bit_table(name):
    layout = PRESETS[name].layout(PRESETS[name].client_limit)
    bits = sum(p.bit_length() for p in Engine(layout).primes)
    assert bits <= {4096: 109, 8192: 218}[layout.degree]
    with pytest.raises(InputError, match="128-bit table"):
        Preset("weak", 4096, (60, 60), 1, 1, 0, 0)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("clients", [1, 2, 10])
def test_the_largest_sum_fits_the_modulus_and_the_noise_stays_below_one_half(name, clients):
    layout = PRESETS[name].layout(clients)
    radix = 2**layout.radix_bits
    largest = clients * layout.levels * sum(radix**f for f in range(layout.fields))
    noise = 3.2 * np.sqrt(layout.degree / 2) * np.sqrt(clients)
    assert clients * layout.levels < radix / 2
    assert largest < 2**46  # whole in float64, and in its Fourier transform to 2^-7
    assert np.sqrt(2) * largest * layout.scale + 64 * noise < min(Engine(layout).primes[:1]) / 2
    assert layout.scale / 2 >= 7 * noise


@pytest.mark.parametrize("name", PRESETS)
def test_packing_is_undone_by_unpacking(name):
    layout = PRESETS[name].layout(3)
    rng = np.random.default_rng(0)
    for count in (0, 1, layout.values - 1, layout.values):
        integers = rng.integers(-layout.levels, layout.levels + 1, count).astype(float)
        back, mark, distance = unpack(pack(integers, layout, 3 - 4j), layout)
        assert np.array_equal(back[:count], integers) and not back[count:].any()
        assert mark == 3 - 4j and distance == 0


def test_canaries_differ_by_place_and_by_what_they_are_bound_to():
    layout = PRESETS["quantised"].layout(10)
    marks = {canary(b, n, layout) for b in (b"x", b"y") for n in range(50)}
    assert len(marks) == 100


@pytest.mark.parametrize("size", [0, 15, 31, 40, 10**6])
def test_ciphertexts_of_a_wrong_length_are_refused(engine, cipher, size):
    with pytest.raises(Rejected, match="ciphertext"):
        engine.load((cipher * 40)[:size], seeded=True)


def test_ciphertexts_of_other_parameters_are_refused(engine):
    for other in (PRESETS["many"].layout(10), PRESETS["quantised"].layout(2)):
        foreign = Engine(other)
        secret = foreign.new_secret()
        data = foreign.encrypt(foreign.encryptor(secret), np.ones(other.slots, complex))
        with pytest.raises(Rejected):
            engine.load(data, seeded=True)


def test_a_compressed_stream_that_inflates_too_far_is_refused_before_seal_sees_it(engine):
    block = lambda last: ((1 << 17) << 3 | 1 << 1 | last).to_bytes(3, "little") + b"\0"  # noqa: E731
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, 0x58]) + block(0) * 5000 + block(1)
    header = b"\x5e\xa1\x10\x04\x03\x02\0\0" + (len(frame) + 16).to_bytes(8, "little")
    with pytest.raises(Rejected, match="inflates too far"):
        engine.load(header + frame, seeded=True)
    wide = b"\x28\xb5\x2f\xfd" + bytes([0, 0xF8]) + block(1)
    header = b"\x5e\xa1\x10\x04\x03\x02\0\0" + (len(wide) + 16 + 100).to_bytes(8, "little")
    with pytest.raises(Rejected, match="damaged"):
        engine.load(header + wide + bytes(100), seeded=True)


def test_a_true_ciphertext_passes(engine, cipher):
    assert engine.load(cipher, seeded=True).size() == 2
    assert engine.load(_uncompressed(cipher), seeded=True).size() == 2
    total = engine.load(cipher, seeded=True)
    engine.add(total, engine.load(cipher, seeded=True))
    assert engine.load(engine.save(total), seeded=False).size() == 2


def _uncompressed(cipher):
    content = zstandard.ZstdDecompressor().decompress(cipher[16:])
    return cipher[:5] + bytes(3) + (16 + len(content)).to_bytes(8, "little") + content


def test_no_field_but_coefficients_and_seed_may_differ(engine, cipher):
    """SEAL ends the process at some false inner sizes: it must never be asked."""
    honest = _uncompressed(cipher)
    fields = [*range(16, 16 + 97), *range(len(honest) - 81, len(honest) - 64)]
    for at in fields:
        forged = bytearray(honest)
        forged[at] ^= 0x41
        with pytest.raises(Rejected, match="another size, level or scale"):
            engine.load(bytes(forged), seeded=True)
    with pytest.raises(Rejected, match="another size, level or scale"):
        shorter = honest[:8] + (len(honest) - 8).to_bytes(8, "little") + honest[16:-8]
        engine.load(shorter, seeded=True)


def _encrypt_in_child(engine, secret, queue):
    data = engine.encrypt(engine.encryptor(secret), np.ones(engine.layout.slots, complex))
    queue.put(len(data))


def test_a_forked_child_does_not_share_the_file_in_memory(engine):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork on this system")
    secret = engine.new_secret()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_encrypt_in_child, args=(engine, secret, queue))
    child.start()
    assert queue.get(timeout=600) > 30_000
    child.join()


@pytest.mark.slow
def test_importing_loads_neither_tenseal_nor_cryptography_and_a_missing_one_names_pip():
    code = (
        "import sys\n"
        "from vitguard.defenses.encryption import KeySet\n"
        "from vitguard.errors import MissingExtra\n"
        "assert not {'tenseal', 'cryptography'} & set(sys.modules)\n"
        "sys.modules['tenseal'] = None\n"
        "try: KeySet.generate()\n"
        "except MissingExtra as error: assert 'pip install tenseal' in str(error), error\n"
        "else: raise SystemExit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
