"""A round is bound to a message when it is made; what a client keeps never goes back."""

import json
import math

import numpy as np
import pytest
import torch

import vitguard as vg
from vitguard import rounds
from vitguard.core import Update
from vitguard.defenses.encryption import Aggregator, Encryptor, KeySet, Manifest, SigningKey
from vitguard.defenses.masking import MaskingClient, Terms
from vitguard.errors import InputError, Rejected
from vitguard.federated.local import LocalClient
from vitguard.rounds import Progress, Round, next_version


@pytest.fixture
def party(small_vit):
    """A guard that encrypts as client "a", its encryptor, and how the server takes messages."""
    signing = SigningKey.generate()
    keys = KeySet.generate(server=signing.public_bytes())
    stack = [vg.FixedPositions("sincos"), vg.EncryptedGradients(select="all")]
    shape = vg.protect(small_vit(), stack, generator=torch.Generator())
    manifest = Manifest.of(shape.encrypted(), bounds=1.0, max_weight=8.0)

    def guard(**options):
        encryptor = Encryptor(keys, manifest, client_id="a", **options)
        sealing = vg.EncryptedGradients(select="all", encryptor=encryptor)
        return vg.protect(small_vit(), [stack[0], sealing]), encryptor

    def server(number, base):
        return Aggregator(keys.for_server(), manifest, signing=signing, round_id=number, base=base)

    return guard, server


def difference(guard, value=0.01):
    tensors = {
        n: torch.full_like(t, value if t.is_floating_point() else 0)
        for n, t in guard.model.state_dict().items()
        if n in guard.shared_names()
    }
    return Update(tensors, kind="difference", learning_rate=0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"number": -1}, {"number": True}, {"number": 2**63}, {"number": 1.0}, {"base": b"v"},
        {"weight": 0}, {"weight": -1.0}, {"weight": math.nan}, {"weight": math.inf},
        {"weight": True}, {"weight": "1"}, {"client": None},
    ],
)  # fmt: skip
def test_a_round_of_nonsense_is_refused(wrong):
    with pytest.raises(InputError, match="Expected"):
        Round(**({"number": 1, "base": "v"} | wrong))


@pytest.mark.parametrize("three", [np.int64(3), np.float32(3), torch.tensor(3), np.array([3.0])])
def test_numbers_as_numpy_and_torch_hold_them_are_weights(small_vit, three):
    """What counting examples gives: a sum of NumPy is no number of Python."""
    guard = vg.protect(small_vit(depth=1), [])
    with guard.round(np.int64(2), base="v", weight=three):
        now = rounds.current()
    assert (now.number, now.weight) == (2, 3) and type(now.number) is int
    manifest = Manifest.of({"w": torch.zeros(2)}, bounds=1.0, max_weight=three)
    assert manifest.max_weight == 3 and "3" in manifest.to_json()
    assert LocalClient(torch.rand(1, 3, 8, 8), torch.zeros(1).long(), weight=three).weight == 3
    names = {c: SigningKey.generate() for c in "abc"}
    public = {c: key.public_bytes() for c, key in names.items()}
    terms = Terms(manifest, public, SigningKey.generate().public_bytes())
    assert terms.check_weight(three) == 3
    assert MaskingClient(terms, names["a"], client_id="a").start_round(np.int64(1), weight=three)
    encryptor = Encryptor(KeySet.generate(), manifest, client_id="a")
    encryptor.start_round(np.int64(1), weight=three)
    assert encryptor.encrypt({"w": torch.zeros(2)})


def test_yes_is_no_weight_of_an_encrypted_message():
    manifest = Manifest.of({"w": torch.zeros(2)}, bounds=1.0)
    encryptor = Encryptor(KeySet.generate(), manifest, client_id="a")
    encryptor.start_round(1, weight=True)
    with pytest.raises(InputError, match=r"a weight above 0 .* got True"):
        encryptor.encrypt({"w": torch.zeros(2)})


def test_the_round_is_the_one_of_the_message_and_not_of_protect(party):
    make, server = party
    guard, _ = make()
    for number in (3, 4):
        with guard.round(number, base=f"v{number}", weight=2.0, client="a"):
            sent = guard.seal(difference(guard))
        total = server(number, f"v{number}")
        total.add(sent.payloads["encryption"])
        assert total.weights == {"a": 2.0}
    assert rounds.current() is None


def test_outside_of_a_round_nothing_leaves(party):
    guard, _ = party[0]()
    with guard.round(1, base="v"):
        pass
    with pytest.raises(InputError, match="round"):
        guard.seal(difference(guard))


def test_the_round_of_another_client_is_refused(party):
    guard, _ = party[0]()
    with guard.round(1, base="v", client="b"), pytest.raises(InputError, match="'a'"):
        guard.seal(difference(guard))


def test_an_older_start_round_is_not_taken_for_the_round_of_the_block(party):
    guard, encryptor = party[0]()
    encryptor.start_round(1, base="v")
    assert guard.seal(difference(guard)).payloads  # it still works by itself
    with guard.round(2, base="v"), pytest.raises(InputError, match="start_round"):
        guard.seal(difference(guard))


def test_a_third_party_defense_reads_the_round():
    with rounds.bound(Round(7, "v")), rounds.bound(Round(8, "w")) as inner:
        assert rounds.current() is inner
    assert rounds.current() is None


def test_versions_depend_on_base_and_sum_and_on_the_whole_history():
    a = next_version(next_version("v", b"1"), b"2")
    assert a == next_version(next_version("v", b"1"), b"2") and len(bytes.fromhex(a)) == 32
    others = {
        next_version(next_version("v", b"2"), b"1"), next_version("v", b"12"),
        next_version(next_version("w", b"1"), b"2"), next_version("v1", b"2"),
    }  # fmt: skip
    assert len(others) == 4 and a not in others


def test_progress_never_goes_back(tmp_path):
    path = tmp_path / "progress.json"
    first = Progress().after(3, "v3")
    first.save(path)
    first.save(path)
    assert Progress.load(path) == first and path.stat().st_mode & 0o077 == 0
    for earlier in (Progress(), Progress(2, "v2"), Progress(3, "other")):
        with pytest.raises(Rejected):
            earlier.save(path)
    with pytest.raises(Rejected):
        first.after(3, "v4")
    first.after(4, "v4").save(path)
    assert Progress.load(path).opened == 4


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"opened": 1}', '{"opened": "1", "base": ""}',
             '{"opened": 1, "base": "", "more": 1}', '{"opened": NaN, "base": ""}', "[" * 9999],
)  # fmt: skip
def test_a_damaged_progress_is_refused(text, tmp_path):
    path = tmp_path / "progress.json"
    path.write_text(text)
    with pytest.raises(InputError):
        Progress.load(path)
    with pytest.raises(InputError):
        Progress(5, "v").save(path)
    with pytest.raises(InputError):
        Progress.load(tmp_path / "missing")


def test_the_ledger_survives_as_bytes_without_the_draws(small_vit):
    stack = [vg.ClientPrivacy(noise=1.0, rounds=10)]
    guard = vg.protect(small_vit(), stack, generator=torch.Generator().manual_seed(1))
    guard.seal(difference(guard))
    whole, ledger = guard.state_bytes(), guard.state_bytes(draws=False)
    assert "draws" in json.loads(whole) and "draws" not in json.loads(ledger)
    for data in (whole, ledger):
        again = vg.protect(small_vit(), stack, generator=torch.Generator())
        again.load_state_bytes(data)
        assert again.privacy_spent().epsilon == guard.privacy_spent().epsilon > 0
    assert again.state_bytes(draws=False) == ledger
    for wrong in (b"", b"[]", b"{}", b"\xff", b'{"version": 2, "ledger": {}, "draws": "zz"}'):
        with pytest.raises(InputError):
            again.load_state_bytes(wrong)


@pytest.mark.parametrize(
    "stack, local",
    [
        ([], ()),
        ([vg.FixedPositions("sincos")], ("pos_embed",)),
        ([vg.WithheldPositions()], ("pos_embed",)),
        ([vg.PatchShuffle(ratio=0.5)], ()),
    ],
)
def test_shared_names_are_what_leaves(small_vit, stack, local):
    model = small_vit()
    model.register_buffer("seen", torch.tensor(3))
    names = set(model.state_dict()) - set(local)
    guard = vg.protect(model, stack)
    shared = guard.shared_names()
    assert len(set(shared)) == len(shared)
    assert {n for n in shared if not n.startswith("vitguard.")} == names
    own = dict(guard.model.named_parameters())
    assert all(n in own for n in shared if n.startswith("vitguard."))
    state = {n: guard.model.state_dict()[n] for n in shared}
    for given in (state, {n: np.array(t) for n, t in state.items()}):
        sent = guard.seal(Update(given, kind="difference", learning_rate=0.1))
        assert set(sent.tensors) == set(shared)
        assert sent.tensors["seen"].dtype == torch.int64


def test_clipped_values_and_those_not_finite_are_counted_in_the_update(party):
    guard, _ = party[0](outliers="clip")
    update = difference(guard)
    spoiled = dict(update.tensors)
    spoiled["cls_token"] = torch.full_like(spoiled["cls_token"], math.nan)
    spoiled["norm.bias"] = torch.zeros_like(spoiled["norm.bias"])
    spoiled["norm.bias"][:2] = 50.0
    with guard.round(1, base="v"):
        sent = guard.seal(Update(spoiled, kind="difference", learning_rate=0.1))
        assert sent.clipped == {"cls_token": 96, "norm.bias": 2}
        assert not guard.seal(update).clipped
