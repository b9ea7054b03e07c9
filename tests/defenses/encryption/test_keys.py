"""Keys stay where they belong."""

import copy
import json
import logging
import os
import pickle
import stat

import pytest
import torch

from vitguard.defenses.encryption import (
    Decryptor,
    EncryptedGradients,
    Encryptor,
    KeySet,
    Manifest,
    ServerKeys,
)
from vitguard.errors import InputError, Rejected

PASSPHRASE = "correct horse"


@pytest.fixture(scope="module")
def keys():
    return KeySet.generate()


def secret_of(keys):
    return keys._KeySet__secret


def encoded(secret):
    import base64

    return [secret[40:60], base64.b64encode(secret)[60:90], secret[40:60].hex().encode()]


def test_saved_keys_load_again_under_the_passphrase(keys, tmp_path):
    path = tmp_path / "keys.json"
    keys.save(path, PASSPHRASE)
    loaded = KeySet.load(path, PASSPHRASE)
    assert loaded.fingerprint == keys.fingerprint
    assert secret_of(loaded) == secret_of(keys)
    assert loaded.public_bytes() == keys.public_bytes()


def test_keys_in_a_file_are_replaced_only_when_asked(keys, tmp_path):
    path = tmp_path / "keys.json"
    keys.save(path, PASSPHRASE)
    fresh = keys.rotate()
    with pytest.raises(InputError, match="overwrite=True"):
        fresh.save(path, PASSPHRASE)
    assert KeySet.load(path, PASSPHRASE).fingerprint == keys.fingerprint
    fresh.save(path, PASSPHRASE, overwrite=True)
    assert KeySet.load(path, PASSPHRASE).fingerprint == fresh.fingerprint


def test_a_saved_file_is_encrypted_under_the_passphrase_and_readable_by_its_owner_alone(
    keys, tmp_path
):
    path = tmp_path / "keys.json"
    keys.save(path, PASSPHRASE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    assert not any(piece in content for piece in encoded(secret_of(keys)))
    assert os.listdir(tmp_path) == ["keys.json"]
    path.chmod(0o644)
    with pytest.raises(Rejected, match="chmod 600"):
        KeySet.load(path, PASSPHRASE)


def test_a_wrong_passphrase_or_a_changed_file_is_refused(keys, tmp_path):
    path = tmp_path / "keys.json"
    keys.save(path, PASSPHRASE)
    with pytest.raises(Rejected, match="wrong passphrase"):
        KeySet.load(path, "battery staple")
    stored = json.loads(path.read_text())
    changes = [
        {"max_clients": 3}, {"preset": "many"}, {"preset": "none"}, {"generation": 4},
        {"secret": "AAAA"}, {"secret": "?"}, {"salt": "zz"}, {"version": 2}, {"nonce": None},
    ]  # fmt: skip
    for change in changes:
        path.write_text(json.dumps({**stored, **change}))
        with pytest.raises(Rejected):
            KeySet.load(path, PASSPHRASE)
    for content in ("", "[]", "{}", "\x00" * 50):
        path.write_text(content)
        with pytest.raises(Rejected):
            KeySet.load(path, PASSPHRASE)
    with pytest.raises(InputError, match="no file"):
        KeySet.load(tmp_path / "missing", PASSPHRASE)
    with pytest.raises(InputError, match="passphrase"):
        keys.save(tmp_path / "new.json", "")


def test_the_secret_key_is_in_no_repr_pickle_or_log_and_no_message_or_server_key_contains_it(
    keys, caplog
):
    manifest = Manifest.of({"w": torch.ones(5)}, bounds=1.0)
    encryptor = Encryptor(keys, manifest, client_id="a")
    decryptor = Decryptor(keys, manifest)
    defense = EncryptedGradients(encryptor=encryptor)
    for thing in (keys, encryptor, decryptor, defense, keys.authority):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(thing)
    with caplog.at_level(logging.DEBUG):
        message = encryptor.encrypt({"w": torch.ones(5)}, round_id=0)
    things = (keys, encryptor, decryptor, defense, keys.authority, defense.settings(), manifest)
    shown = " ".join(map(repr, things)).encode() + caplog.text.encode()
    master = keys.authority.to_bytes()
    for piece in encoded(secret_of(keys)):
        assert piece not in shown + message + keys.public_bytes()
    assert json.loads(master)["master"].encode() not in shown + message


def test_copies_share_one_secret(keys):
    assert copy.deepcopy(keys) is keys and copy.copy(keys) is keys


def test_the_server_holds_nothing_that_decrypts(keys):
    server = ServerKeys.load(keys.public_bytes())
    assert server.fingerprint == keys.fingerprint
    assert not hasattr(server, "open")
    with pytest.raises(AttributeError):
        Decryptor(server, Manifest.of({"w": torch.ones(5)}, bounds=1.0))


def test_a_client_file_is_no_server_key(keys, tmp_path):
    path = tmp_path / "keys.json"
    keys.save(path, PASSPHRASE)
    for content in (path.read_bytes(), b"", b"{}", b"[1]", b"\xff" * 9):
        with pytest.raises(Rejected):
            ServerKeys.load(content)


def test_rotation_makes_new_keys_of_the_same_settings(keys):
    fresh = keys.rotate()
    assert (fresh.preset, fresh.max_clients) == (keys.preset, keys.max_clients)
    assert fresh.generation == keys.generation + 1
    assert fresh.fingerprint != keys.fingerprint
    assert secret_of(fresh) != secret_of(keys)


def test_more_clients_than_the_preset_takes_are_refused():
    for preset, clients in (("quantised", 11), ("many", 101), ("quantised", 0)):
        with pytest.raises(InputError, match="clients for preset"):
            KeySet.generate(preset=preset, max_clients=clients)
    with pytest.raises(InputError, match="as the preset"):
        KeySet.generate(preset="strong")
