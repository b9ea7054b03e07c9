"""Two runs into one folder of keys: nothing is mixed, and nothing is half-written."""

import pytest

pytest.importorskip("flwr", reason="needs vitguard[flower]")

import vitguard as vg
from tests.federated.flower_rounds import tiny
from vitguard.defenses.encryption import Manifest, SigningKey, keyfile
from vitguard.errors import InputError
from vitguard.federated.flower import make_keys, write_masked_keys

LIMITS = {"bounds": 1.0, "max_weight": 4.0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(keyfile, "_COST", 1 << 4)  # passphrases are not what is tested here
    monkeypatch.setattr(keyfile, "_COSTS", (1 << 4,))
    return tmp_path


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def encrypted(small_vit, folder, clients):
    sealed = vg.protect(tiny(small_vit), "encryption").encrypted()
    make_keys(folder, "pass", sealed, clients=clients, **LIMITS)


def masked(small_vit, folder, clients):
    sealed = vg.protect(tiny(small_vit), "masking").encrypted()
    identities = {name: SigningKey.generate() for name in clients}
    write_masked_keys(folder, "pass", Manifest.of(sealed, **LIMITS), identities)


@pytest.mark.parametrize("make", [encrypted, masked])
@pytest.mark.parametrize("left", ["all", "client-1", "all but client-1"])
def test_keys_of_a_second_run_leave_a_folder_as_it_was(small_vit, folder, make, left):
    """Also where the names differ, or where a first run was broken off: no key is mixed in."""
    make(small_vit, folder, ["1", "2", "3"])
    for file in folder.iterdir():
        if left != "all" and (file.stem == "client-1") != (left == "client-1"):
            file.unlink()
    before = files(folder)
    names = ["1", "4", "5"] if left == "client-1" else ["4", "5", "6"]
    with pytest.raises(InputError, match="Make a folder for each run"):
        make(small_vit, folder, names)
    assert files(folder) == before


def test_whoever_is_second_of_two_at_once_writes_nothing(small_vit, folder, monkeypatch):
    """The other one comes between the look into the folder and the first file."""
    for make, name in ((encrypted, "server.keys"), (masked, "terms.json")):
        generate, other = SigningKey.generate, b"of the other"

        def meanwhile(generate=generate, name=name, other=other):
            (folder / name).write_bytes(other)
            return generate()

        monkeypatch.setattr(SigningKey, "generate", staticmethod(meanwhile))
        if make is masked:  # identities are made before the call
            sealed = vg.protect(tiny(small_vit), "masking").encrypted()
            public = {n: generate().public_bytes() for n in "123"}
            with pytest.raises(InputError, match="is there already"):
                write_masked_keys(folder, "pass", Manifest.of(sealed, **LIMITS), public)
        else:
            with pytest.raises(InputError, match="is there already"):
                make(small_vit, folder, ["1", "2"])
        assert files(folder) == {name: other}
        (folder / name).unlink()
        monkeypatch.setattr(SigningKey, "generate", staticmethod(generate))


def test_masks_may_share_a_folder_with_encryption_that_was_there_first(small_vit, folder):
    encrypted(small_vit, folder, ["1", "2"])
    masked(small_vit, folder, ["1", "2", "3"])
    before = files(folder)
    with pytest.raises(InputError, match="Make a folder for each run"):
        encrypted(small_vit, folder, ["1", "2"])
    assert files(folder) == before
