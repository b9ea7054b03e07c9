"""Keys stay where they belong."""

import base64
import copy
import json
import logging
import os
import pickle
import stat
import threading
import traceback
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from vitguard.defenses.encryption import (
    Decryptor,
    EncryptedGradients,
    Encryptor,
    KeySet,
    Manifest,
    ServerKeys,
    SigningKey,
    backend,
    keyfile,
)
from vitguard.defenses.encryption.backend import Engine, shared_engine
from vitguard.defenses.encryption.secret import Secret
from vitguard.errors import InputError, Rejected, Unprotected, VitguardError

PASSPHRASE = "correct horse"
OLD_FILE = Path(__file__).parent / "keys_v1.json"


@pytest.fixture(scope="module")
def signing():
    return SigningKey.generate()


@pytest.fixture(scope="module")
def keys(signing):
    return KeySet.generate(server=signing.public_bytes())


@pytest.fixture
def cheap(monkeypatch):
    """Tests of the file alone need no strong cost."""

    def derived(passphrase, salt, cost):
        return Secret(
            Scrypt(salt=salt, length=32, n=2, r=8, p=1).derive(passphrase.reveal().encode())
        )

    monkeypatch.setattr(keyfile, "_derived", derived)


def secret_of(keys):
    return shared_engine(keys.layout).secret_bytes(keys._KeySet__secret).reveal()


def secrets_of(keys, signing):
    """Every secret by every way in which it could be written."""
    stored = json.loads(keys.authority.to_json().reveal())
    macs = [bytes.fromhex(k) for k in (stored["master"], *stored["known"].values()) if k]
    seed = signing._SigningKey__key.private_bytes_raw()
    own = secret_of(keys)
    for secret in (own[40:60], own[2000:2020], seed, *macs):
        yield from (secret, repr(secret)[2:-1].encode(), secret.hex().encode())
        yield base64.b64encode(secret)[2:-4]
    yield base64.b64encode(own)[60:90]


@pytest.mark.slow
def test_saved_keys_load_again_under_the_passphrase(keys, signing, tmp_path):
    path = tmp_path / "keys.json"
    for held in (keys, keys.for_client("a")):
        held.save(path, PASSPHRASE, overwrite=True)
        loaded = KeySet.load(path, PASSPHRASE)
        assert loaded.fingerprint == keys.fingerprint and loaded.server == signing.public_bytes()
        assert secret_of(loaded) == secret_of(keys)
        assert loaded.authority.to_json().reveal() == held.authority.to_json().reveal()
    keys.for_server().save(path, PASSPHRASE, overwrite=True)
    server = ServerKeys.load(path, PASSPHRASE)
    assert server.fingerprint == keys.fingerprint
    assert server.authority.code("a", b"x") == keys.for_client("a").authority.code("a", b"x")
    signing.save(path, PASSPHRASE, overwrite=True)
    assert SigningKey.load(path, PASSPHRASE).public_bytes() == signing.public_bytes()


def test_two_files_of_one_key_and_passphrase_share_nothing_that_was_drawn(keys, tmp_path, cheap):
    stored = []
    for name in ("one", "two"):
        keys.save(tmp_path / name, PASSPHRASE)
        stored.append(json.loads((tmp_path / name).read_text()))
    for drawn in ("salt", "nonce", "secret"):
        assert stored[0][drawn] != stored[1][drawn], drawn


@pytest.mark.slow
def test_key_files_of_the_version_before_still_load(tmp_path):
    path = tmp_path / "keys.json"
    path.write_bytes(OLD_FILE.read_bytes())
    path.chmod(0o600)
    keys = KeySet.load(path, PASSPHRASE)
    assert (keys.fingerprint.hex(), keys.max_clients) == ("cf0102b4da97ddfe8d98fc3b62968f0a", 3)
    assert keys.server is None and keys.authority.complete
    manifest = Manifest.of({"w": torch.ones(3)}, bounds=1.0)
    with pytest.raises(InputError, match="trusting"):
        Decryptor(keys, manifest)
    signing = SigningKey.generate()
    keys.trusting(signing.public_bytes()).save(path, PASSPHRASE, overwrite=True)
    again = KeySet.load(path, PASSPHRASE)
    assert secret_of(again) == secret_of(keys) and Decryptor(again, manifest)
    with pytest.raises(Rejected, match="wrong passphrase"):
        path.write_bytes(OLD_FILE.read_bytes())
        KeySet.load(path, "battery staple")


def test_keys_in_a_file_are_replaced_only_when_asked(keys, tmp_path, cheap):
    path = tmp_path / "keys.json"
    keys.save(path, PASSPHRASE)
    fresh = keys.rotate()
    with pytest.raises(InputError, match="overwrite=True"):
        fresh.save(path, PASSPHRASE)
    assert KeySet.load(path, PASSPHRASE).fingerprint == keys.fingerprint
    fresh.save(path, PASSPHRASE, overwrite=True)
    assert KeySet.load(path, PASSPHRASE).fingerprint == fresh.fingerprint


def test_a_file_that_appears_while_keys_are_saved_is_kept(keys, tmp_path, cheap, monkeypatch):
    path = tmp_path / "keys.json"
    derived = keyfile._derived

    def meanwhile(*arguments):
        path.write_text("another process was faster")
        return derived(*arguments)

    monkeypatch.setattr(keyfile, "_derived", meanwhile)
    with pytest.raises(InputError, match="overwrite=True"):
        keys.save(path, PASSPHRASE)
    assert path.read_text() == "another process was faster"
    assert os.listdir(tmp_path) == ["keys.json"]


def test_of_many_threads_that_save_to_one_path_one_succeeds(keys, tmp_path, cheap):
    path, done, inside = tmp_path / "keys.json", [], threading.Barrier(6, timeout=600)

    def attempt(fresh):
        inside.wait()
        try:
            fresh.save(path, PASSPHRASE)
            done.append(fresh.public_bytes())
        except InputError as error:
            assert "overwrite=True" in str(error)

    threads = [threading.Thread(target=attempt, args=(SigningKey.generate(),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1 and SigningKey.load(path, PASSPHRASE).public_bytes() == done[0]
    assert os.listdir(tmp_path) == ["keys.json"]


def test_a_saved_file_is_encrypted_under_the_passphrase_and_readable_by_its_owner_alone(
    keys, signing, tmp_path, cheap
):
    path = tmp_path / "keys.json"
    for kind, thing in ((KeySet, keys), (ServerKeys, keys.for_server()), (SigningKey, signing)):
        thing.save(path, PASSPHRASE, overwrite=True)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        content = path.read_bytes()
        assert not any(piece in content for piece in secrets_of(keys, signing))
        assert os.listdir(tmp_path) == ["keys.json"]
        path.chmod(0o644)
        with pytest.raises(Rejected, match="chmod 600"):
            kind.load(path, PASSPHRASE)


def test_a_key_file_costs_128_mib_to_try_and_can_ask_for_no_more_than_256(keys, tmp_path, cheap):
    path = tmp_path / "keys.json"
    keys.save(path, PASSPHRASE)
    stored = json.loads(path.read_text())
    assert stored["n"] == 2**17
    for cost in (
        2**14,
        2**16,
        2**17 + 1,
        2**19,
        2**30,
        2**64,
        -1,
        0,
        2.0**17,
        True,
        None,
        "131072",
    ):
        path.write_text(json.dumps({**stored, "n": cost}))
        with pytest.raises(Rejected, match="scrypt cost"):
            KeySet.load(path, PASSPHRASE)
    path.write_text(json.dumps({**stored, "n": 2**18}))
    with pytest.raises(Rejected, match="changed file"):
        KeySet.load(path, PASSPHRASE)


def test_a_wrong_passphrase_or_a_changed_file_is_refused(keys, tmp_path, cheap):
    path = tmp_path / "keys.json"
    keys.save(path, PASSPHRASE)
    with pytest.raises(Rejected, match="wrong passphrase"):
        KeySet.load(path, "battery staple")
    stored = json.loads(path.read_text())
    changes = [
        {"max_clients": 3}, {"preset": "many"}, {"preset": "none"}, {"generation": 4},
        {"secret": "AAAA"}, {"secret": "?"}, {"salt": "zz"}, {"version": 3}, {"nonce": None},
        {"version": 1}, {"server": None}, {"server": "00" * 32}, {"kind": "server"}, {"more": 1},
        {"nonce": ""}, {"salt": ""}, {"version": True}, {"secret": []}, {"key_id": "\ud800"},
    ]  # fmt: skip
    for change in changes:
        path.write_text(json.dumps({**stored, **change}))
        with pytest.raises(Rejected):
            KeySet.load(path, PASSPHRASE)
    deep = "[" * 200_000
    for content in ("", "[]", "{}", "\x00" * 50, deep, '{"a":' * 100_000, "1" * 5000, "NaN", "7"):
        path.write_text(content)
        for kind in (KeySet, ServerKeys, SigningKey):
            with pytest.raises(Rejected):
                kind.load(path, PASSPHRASE)
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(Rejected, match="larger than any"):
        KeySet.load(path, PASSPHRASE)
    for nowhere in (tmp_path / "missing", tmp_path, tmp_path / "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(InputError):
            KeySet.load(nowhere, PASSPHRASE)
    for wrong in ("", None, b"bytes", 5):
        with pytest.raises(InputError, match="passphrase"):
            keys.save(tmp_path / "new.json", wrong)


def rewritten(path, change, passphrase=PASSPHRASE):
    """Change what is inside a key file: whoever knows the passphrase can."""
    stored = json.loads(path.read_text())
    sealed = base64.b64decode(stored.pop("secret"))
    salt, nonce = bytes.fromhex(stored["salt"]), bytes.fromhex(stored["nonce"])
    key = keyfile._derived(Secret(passphrase), salt, stored["n"]).reveal()
    associated = json.dumps(stored, sort_keys=True).encode()
    plain = change(AESGCM(key).decrypt(nonce, sealed, associated))
    sealed = AESGCM(key).encrypt(nonce, plain, associated)
    path.write_text(json.dumps({**stored, "secret": base64.b64encode(sealed).decode()}))


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: b"", lambda plain: b"[" * 100_000, lambda plain: b"[]",
        lambda plain: json.dumps({**json.loads(plain), "authority": 5}).encode(),
        lambda plain: json.dumps({**json.loads(plain), "authority": "{}"}).encode(),
        lambda plain: json.dumps(
            {**json.loads(plain), "authority": '{"master": "00", "known": {}}'}
        ).encode(),
        lambda plain: json.dumps({**json.loads(plain), "secret": "AAAA"}).encode(),
        lambda plain: json.dumps({**json.loads(plain), "secret": None}).encode(),
    ],
)  # fmt: skip
def test_a_key_file_with_other_content_under_the_right_passphrase_is_refused(
    keys, tmp_path, cheap, change
):
    path = tmp_path / "keys.json"
    keys.save(path, PASSPHRASE)
    rewritten(path, change)
    with pytest.raises(Rejected) as caught:
        KeySet.load(path, PASSPHRASE)
    assert_blank(caught.value, keys, None)


def test_a_secret_key_with_false_inner_sizes_never_reaches_seal(keys):
    """SEAL ends the process at some of them."""
    engine, data = shared_engine(keys.layout), secret_of(keys)
    content = engine._inflated(data)
    whole = data[:5] + bytes(3) + (16 + len(content)).to_bytes(8, "little") + content
    assert engine.secret(Secret(whole))
    for at in range(16, 16 + 72):
        forged = bytearray(whole)
        forged[at] ^= 0x41
        with pytest.raises(InputError):
            engine.secret(Secret(bytes(forged)))


def frames(error):
    """All that a traceback with locals would show of frames outside this file.

    Frames of jaxtyping stand there only while VITGUARD_SHAPES checks annotations.
    """
    waiting = [traceback.TracebackException.from_exception(error, capture_locals=True)]
    shown = [repr(error), repr(error.args)]
    while waiting:
        seen = waiting.pop()
        stack = [f for f in seen.stack if f.filename != __file__ and "jaxtyping" not in f.filename]
        shown += [str(seen), *(str(f.locals) for f in stack)]
        waiting += [e for e in (seen.__cause__, seen.__context__) if e is not None]
    return "\n".join(shown)


def assert_blank(error, keys, signing):
    shown = frames(error)
    assert PASSPHRASE not in shown and "battery staple" not in shown
    for piece in secrets_of(keys, signing or SigningKey.generate()):
        assert piece.decode("latin-1") not in shown


@pytest.mark.slow
def test_no_traceback_with_locals_shows_a_secret_or_a_passphrase(
    keys, signing, tmp_path, cheap, monkeypatch
):
    path, folder = tmp_path / "keys.json", tmp_path / "missing" / "keys.json"
    things = [keys, keys.for_client("a"), keys.for_server(), signing]

    def refuse(*arguments, **options):
        raise OSError(28, "No space left on device")

    def calls():
        for thing in things:
            thing.save(path, PASSPHRASE, overwrite=True)
            kind = type(thing)
            yield lambda kind=kind: kind.load(path, "battery staple")
            yield lambda thing=thing: thing.save(path, PASSPHRASE)
            yield lambda thing=thing: thing.save(folder, PASSPHRASE)
            yield lambda thing=thing: thing.save(tmp_path, PASSPHRASE, overwrite=True)
            for name in ("fsync", "replace", "fdopen"):
                with monkeypatch.context() as patch:
                    patch.setattr(os, name, refuse)
                    yield lambda thing=thing: thing.save(path, PASSPHRASE, overwrite=True)
            other = KeySet if kind is not KeySet else ServerKeys
            yield lambda other=other: other.load(path, PASSPHRASE)
            for cut in (b"{}", b"[" * 99_999, path.read_bytes()[:-9]):
                path.write_bytes(cut)
                yield lambda kind=kind: kind.load(path, PASSPHRASE)
            for change in (
                lambda plain: plain[:-1],
                lambda plain: plain.replace(b":", b";"),
                lambda plain: plain.replace(b"A", b"-").replace(b"a", b"z").replace(b"0", b"x"),
                lambda plain: plain.replace(b"{", b"{" * 50_000),
                lambda plain: plain[:30] + plain[40:],
            ):
                thing.save(path, PASSPHRASE, overwrite=True)
                rewritten(path, change)
                yield lambda kind=kind: kind.load(path, PASSPHRASE)
            with monkeypatch.context() as patch:
                patch.setattr(backend._Slot, "put", refuse)
                thing.save(path, PASSPHRASE, overwrite=True)
                if kind is KeySet:
                    yield lambda kind=kind: kind.load(path, PASSPHRASE)

    count = 0
    for call in calls():
        with pytest.raises(VitguardError) as caught:
            call()
        assert_blank(caught.value, keys, signing)
        count += 1
    assert count >= 60


def test_the_public_half_of_a_signing_key_is_all_that_is_called_public(keys, signing):
    assert len(signing.public_bytes()) == 32
    for thing in (keys, keys.for_client("a"), keys.for_server(), Manifest):
        assert not any("public" in name for name in dir(thing))
    assert not any(piece in signing.public_bytes() for piece in secrets_of(keys, signing))


def test_the_secret_key_is_in_no_repr_pickle_or_log_and_no_message_or_server_key_contains_it(
    keys, signing, caplog
):
    manifest = Manifest.of({"w": torch.ones(5)}, bounds=1.0)
    encryptor = Encryptor(keys, manifest, client_id="a")
    decryptor = Decryptor(keys, manifest)
    defense = EncryptedGradients(encryptor=encryptor)
    server = keys.for_server()
    held = (keys, encryptor, decryptor, defense, keys.authority, server, signing, Secret("x"))
    for thing in held:
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(thing)
    with caplog.at_level(logging.DEBUG):
        message = encryptor.encrypt({"w": torch.ones(5)}, round_id=0)
    shown = " ".join(map(repr, (*held, defense.settings(), manifest))).encode()
    for piece in secrets_of(keys, signing):
        assert piece not in shown + caplog.text.encode() + message
    given = server.authority.to_json().reveal().encode()
    for piece in (secret_of(keys)[40:60].hex().encode(), base64.b64encode(secret_of(keys))[60:90]):
        assert piece not in given
    assert "x" not in repr(Secret("x"))


def test_copies_share_one_secret(keys, signing):
    for thing in (keys, keys.for_server(), signing, Secret(b"x"), keys.authority):
        assert copy.deepcopy(thing) is thing
    assert copy.copy(keys) is keys


def test_the_server_holds_nothing_that_decrypts(keys):
    server = keys.for_server()
    assert server.fingerprint == keys.fingerprint
    assert not hasattr(server, "open")
    with pytest.raises(InputError, match="a client's keys"):
        Decryptor(server, Manifest.of({"w": torch.ones(5)}, bounds=1.0))


def test_a_client_s_keys_check_no_other_client(keys):
    own = keys.for_client("a")
    with pytest.raises(Rejected, match="keys of all clients"):
        own.for_server()
    with pytest.raises(Rejected, match="not held here"):
        own.authority.code("b", b"")
    assert own.for_client("a").authority.code("a", b"") == keys.authority.code("a", b"")


def test_a_file_of_one_kind_is_none_of_another(keys, signing, tmp_path, cheap):
    path = tmp_path / "keys.json"
    things = {KeySet: keys, ServerKeys: keys.for_server(), SigningKey: signing}
    for kind, thing in things.items():
        thing.save(path, PASSPHRASE, overwrite=True)
        for other in things:
            if other is not kind:
                with pytest.raises(Rejected, match="a file of kind"):
                    other.load(path, PASSPHRASE)


def test_without_a_file_in_memory_the_secret_key_touches_no_disk(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(backend, "shared_engine", Engine)
    from vitguard.defenses.encryption import keys as module

    monkeypatch.setattr(module, "shared_engine", Engine)
    written = []
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda h, data, at: written.append(data) or real(h, data, at))
    keys = KeySet.generate()
    manifest = Manifest.of({"w": torch.ones(5)}, bounds=1.0)
    assert Encryptor(keys, manifest, client_id="a").encrypt({"w": torch.ones(5)}, round_id=0)
    with pytest.raises(Unprotected, match="would touch the disk"):
        keys.save(tmp_path / "keys.json", PASSPHRASE)
    path = tmp_path / "old.json"
    path.write_bytes(OLD_FILE.read_bytes())
    path.chmod(0o600)
    with pytest.raises(Unprotected, match="would touch the disk"):
        KeySet.load(path, PASSPHRASE)
    monkeypatch.undo()
    own = secret_of(keys)[100:140]
    assert not any(own in data for data in written)


def test_rotation_makes_new_keys_of_the_same_settings(keys):
    fresh = keys.rotate()
    assert (fresh.preset, fresh.max_clients) == (keys.preset, keys.max_clients)
    assert fresh.generation == keys.generation + 1 and fresh.server == keys.server
    assert fresh.fingerprint != keys.fingerprint
    assert secret_of(fresh) != secret_of(keys)
    assert fresh.authority.code("a", b"") != keys.authority.code("a", b"")


def test_more_clients_than_the_preset_takes_are_refused():
    for preset, clients in (("quantised", 11), ("many", 101), ("precise", 1001), ("quantised", 0)):
        with pytest.raises(InputError, match="clients for preset"):
            KeySet.generate(preset=preset, max_clients=clients)
    with pytest.raises(InputError, match="as the preset"):
        KeySet.generate(preset="strong")


@pytest.mark.parametrize("clients", [2.5, 10.0, True, "10", None, float("nan")])
def test_a_client_limit_that_is_no_whole_number_makes_no_keys(clients):
    with pytest.raises(InputError, match="Expected a whole number of clients, 1 to 10"):
        KeySet.generate(max_clients=clients)


@pytest.mark.parametrize("preset", [["quantised"], None, 5])
def test_a_preset_that_is_no_name_makes_no_keys(preset):
    with pytest.raises(InputError, match="as the preset, got"):
        KeySet.generate(preset=preset)


@pytest.mark.parametrize("client", ["", "x" * 65, None, 5, b"a", "\ud800"])
def test_no_client_is_given_keys_under_a_name_that_cannot_send(keys, client):
    with pytest.raises(InputError, match="a client id of 1 to 64 bytes"):
        keys.for_client(client)


def test_an_encryptor_of_another_kind_is_refused_when_the_defense_is_made(keys):
    for given in (keys, "client.json"):
        with pytest.raises(InputError, match="Expected an Encryptor, got"):
            EncryptedGradients(encryptor=given)


@pytest.mark.parametrize("path", [None, 5, b"keys.json", "keys\0.json"])
def test_a_path_that_is_none_is_refused(keys, path):
    for act in (keys.save, KeySet.load):
        with pytest.raises(InputError, match="Expected the path of a key file, got"):
            act(path, PASSPHRASE)
