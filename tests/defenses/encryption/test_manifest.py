"""What all parties agree on, read from JSON that nobody vouches for."""

import json
import math
import warnings

import numpy as np
import pytest
import torch

from vitguard import draws as source
from vitguard.defenses.encryption import Encryptor, Entry, KeySet, Manifest, model_version
from vitguard.defenses.encryption.wire import MESSAGE, Context, open_message
from vitguard.errors import InputError, Rejected

TENSORS = {"w": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float64)}


@pytest.fixture(scope="module")
def manifest():
    return Manifest.of(TENSORS, bounds=0.5, max_weight=3)


def test_a_manifest_survives_json_with_its_run_and_digest(manifest):
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest and again.digest() == manifest.digest()
    assert again.run == manifest.run and len(manifest.run) == 32


def test_every_manifest_is_of_another_run_unless_it_is_told(manifest):
    runs = {Manifest.of(TENSORS, bounds=0.5, max_weight=3).digest() for _ in range(20)}
    assert len(runs | {manifest.digest(), manifest.new_run().digest()}) == 22
    told = [Manifest.of(TENSORS, bounds=0.5, run="trial 7").digest() for _ in range(2)]
    assert told[0] == told[1]


def test_a_manifest_of_the_version_before_is_refused_with_what_to_do():
    old = {"entries": [{"bound": 1.0, "double": False, "name": "w", "shape": [3]}], "max_weight": 1}
    with pytest.raises(InputError, match=r"names its run.*Manifest\.of"):
        Manifest.from_json(json.dumps(old))


@pytest.mark.parametrize(
    "change",
    [
        {"max_weight": math.nan}, {"max_weight": math.inf}, {"max_weight": 0}, {"max_weight": -1},
        {"max_weight": "1"}, {"max_weight": True}, {"max_weight": 10**400}, {"max_weight": 1e308},
        {"max_weight": 1e-308}, {"run": ""}, {"run": "x" * 65}, {"run": 5}, {"run": None},
        {"entries": []}, {"entries": {}}, {"entries": None}, {"entries": [1]}, {"more": 1},
        {"entries": [{"name": "w", "shape": [1], "bound": 1.0}]},
        {"entries": "www"},
    ],
)  # fmt: skip
def test_a_changed_manifest_is_one_clear_error(manifest, change):
    with pytest.raises(InputError):
        Manifest.from_json(json.dumps({**json.loads(manifest.to_json()), **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""}, {"name": 5}, {"name": None}, {"shape": [-1]}, {"shape": [1.0]},
        {"shape": [True]}, {"shape": "12"}, {"shape": ""}, {"shape": {}}, {"shape": None},
        {"shape": [2**50]},
        {"shape": [10**400]}, {"bound": math.nan}, {"bound": math.inf}, {"bound": 0.0},
        {"bound": -1.0}, {"bound": 1e308}, {"bound": 5e-324}, {"bound": 10**400}, {"bound": "1"},
        {"bound": True}, {"double": 1}, {"double": None}, {"double": "yes"}, {"more": 1},
    ],
)  # fmt: skip
def test_a_changed_entry_is_one_clear_error(manifest, change):
    stored = json.loads(manifest.to_json())
    stored["entries"][0].update(change)
    with pytest.raises(InputError):
        Manifest.from_json(json.dumps(stored))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "", "7", "null", "[]", '"run"'])
def test_what_is_no_manifest_is_one_clear_error(text):
    with pytest.raises(InputError):
        Manifest.from_json(text)


def test_a_field_that_is_left_out_is_not_filled_in(manifest):
    """Two parties would otherwise read one text as two manifests."""
    stored = json.loads(manifest.to_json())
    for name in stored:
        with pytest.raises(InputError):
            Manifest.from_json(json.dumps({k: v for k, v in stored.items() if k != name}))
    del stored["entries"][0]["double"]
    with pytest.raises(InputError):
        Manifest.from_json(json.dumps(stored))


def test_extreme_bounds_and_weights_give_finite_numbers():
    for bound, weight in ((1e30, 1e30), (1e-30, 1e-30)):
        made = Manifest((Entry("w", (3,), bound, True),), weight)
        encryptor = Encryptor(KeySet.generate(), made, client_id="a")
        tensors = {"w": torch.full((3,), bound, dtype=torch.float64)}
        assert encryptor.encrypt(tensors, round_id=0, weight=weight)
        with pytest.raises(InputError, match="a weight"):
            encryptor.encrypt(tensors, round_id=0, weight=weight * 2.0**-41)


def test_tensors_that_are_not_dense_numbers_are_refused_and_not_encrypted():
    made = Manifest.of({"w": torch.zeros(2, 2)}, bounds=1.0)
    encryptor, ones = Encryptor(KeySet.generate(), made, client_id="a"), torch.ones(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = [
            ones.to("meta"), ones.to_sparse(), ones.to_sparse_csr(), ones.to(torch.complex64),
            torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8), ones.to(torch.float8_e4m3fn),
            ones.bool(), ones.long(),
        ]  # fmt: skip
    for tensor in kinds:
        with pytest.raises(Rejected) as caught:
            encryptor.encrypt({"w": tensor}, round_id=0)
        assert caught.value.cause == "manifest"


@pytest.mark.parametrize("round_id", [-1, 2**63, 1.0, "1", True, float("nan")])
def test_rounds_are_whole_numbers(round_id):
    made = Manifest.of({"w": torch.zeros(2)}, bounds=1.0)
    encryptor = Encryptor(KeySet.generate(), made, client_id="a")
    with pytest.raises(InputError, match="whole round number"):
        encryptor.encrypt({"w": torch.zeros(2)}, round_id=round_id)


@pytest.mark.parametrize("client_id", ["", "x" * 65, "\ud800", 5, None, b"a"])
def test_client_ids_are_short_texts(client_id):
    with pytest.raises(InputError, match="client id"):
        Encryptor(KeySet.generate(), Manifest.of(TENSORS, bounds=1.0), client_id=client_id)


def test_messages_of_the_version_before_are_refused_with_a_clear_error(run):
    old = bytearray(run.message())
    old[4] = 1
    context = Context(run.keys, run.manifest, 5, "v1")
    with pytest.raises(
        Rejected, match="wire version 1 of an earlier vitguard; this is 2"
    ) as caught:
        open_message(bytes(old), MESSAGE, context)
    assert caught.value.cause == "version"
    old[4] = 3
    with pytest.raises(Rejected, match="a later vitguard"):
        open_message(bytes(old), MESSAGE, context)


def test_rounding_takes_a_fresh_key_of_the_system_for_each_piece(monkeypatch):
    """Nothing of it is in the process: no seed to search for, none to restore or to fork."""
    keys, asked = KeySet.generate(), []
    real = source.secrets.token_bytes
    tensors = {"w": torch.zeros((1 << 17) + 5)}
    encryptor = Encryptor(keys, Manifest.of(tensors, bounds=1.0), client_id="a")
    assert encryptor._draws.seeded is None
    monkeypatch.setattr(source.secrets, "token_bytes", lambda n: asked.append(n) or real(n))
    list(encryptor._integers(tensors, 1.0))
    assert asked == [32, 32]


def test_a_generator_makes_the_rounding_reproducible():
    keys, tensors = KeySet.generate(), {"w": torch.rand(1000)}
    manifest = Manifest.of(tensors, bounds=1.0)

    def rounded(seed):
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        encryptor = Encryptor(keys, manifest, client_id="a", generator=generator)
        return next(encryptor._integers(tensors, 1.0)).tolist()

    assert rounded(1) == rounded(1) != rounded(2)
    assert rounded(None) != rounded(None)


def test_the_version_of_a_model_is_that_of_its_values_however_they_are_held():
    weights = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3), "e": torch.zeros(0)}
    arrays = {n: t.numpy() for n, t in weights.items()}
    big = {**arrays, "w": arrays["w"].astype(">f4")}  # the bytes of another machine
    assert model_version(arrays) == model_version(big) == model_version(weights)
    assert model_version(
        {
            n: t.clone().requires_grad_(t.dtype.is_floating_point)
            for n, t in reversed(weights.items())
        }
    ) == model_version(weights)
    transposed = {**weights, "w": weights["w"].t().contiguous().t()}
    assert model_version(transposed) == model_version(weights)
    assert model_version({**weights, "w": weights["w"].half()}) != model_version(weights)


@pytest.mark.parametrize(
    "given",
    [
        None, "weights.safetensors", torch.nn.Linear(2, 2), [torch.zeros(2)], {"x": {"y": 1}},
        {"x": torch.eye(2).to_sparse()}, {"x": torch.zeros(2, device="meta")},
    ],
    ids=["none", "path", "model", "list", "extra state", "sparse", "meta"],
)  # fmt: skip
def test_what_is_no_model_has_no_version(given):
    with pytest.raises(InputError, match="Expected"):
        model_version(given)


@pytest.mark.parametrize("bounds", [True, [0.1], torch.ones(2), 1j, {"w": None}, {"w": False}])
def test_bounds_that_are_no_numbers_make_no_manifest(bounds):
    with pytest.raises(InputError, match=r"bound (of|for) w"):
        Manifest.of({"w": torch.zeros(2)}, bounds=bounds)


def test_a_bound_may_be_the_one_number_of_an_array():
    for bound in (np.float32(0.5), np.array([0.5]), torch.tensor(0.5), 0.5):
        assert Manifest.of({"w": torch.zeros(2)}, bounds=bound).entries[0].bound == 0.5


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("outliers", ["refuse", "clip"])
def test_values_at_a_bound_that_float32_does_not_hold_are_within_it(kind, outliers):
    for bound in (0.1, 0.7, 1e-3, 1 / 3):
        values = torch.tensor([9.0, -9.0, 0.0], dtype=kind).clamp(-bound, bound).numpy()
        kept, moved = Entry("w", (3,), bound).within(values, outliers)
        assert moved == 0 and np.array_equal(kept, values)
