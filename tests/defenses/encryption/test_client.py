"""Round trips: what is decrypted is the weighted average, whatever the tensors look like."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitguard import rounds
from vitguard.core import Update
from vitguard.defenses.encryption import (
    PRESETS,
    Aggregator,
    Decryptor,
    Encryptor,
    KeySet,
    Manifest,
    SigningKey,
    worst_error,
)
from vitguard.errors import Blocked, InputError

SIGNING = SigningKey.generate()
SERVER = SIGNING.public_bytes()
KEYS = {name: KeySet.generate(preset=name, server=SERVER) for name in PRESETS}


def average(keys, manifest, clients, weights, **options):
    """Encrypt, add and decrypt."""
    aggregator = Aggregator(keys.for_server(), manifest, signing=SIGNING, round_id=0)
    for number, (tensors, weight) in enumerate(zip(clients, weights, strict=True)):
        encryptor = Encryptor(keys, manifest, client_id=f"c{number}", **options)
        aggregator.add(encryptor.encrypt(tensors, round_id=0, weight=weight))
    return Decryptor(keys, manifest).decrypt(aggregator.finish(), round_id=0)


def plain(clients, weights, name):
    total = sum(w * c[name].double() for c, w in zip(clients, weights, strict=True))
    return total / sum(weights)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_the_average_of_ten_weighted_clients_is_within_the_bound_of_every_preset(preset, rounding):
    generator = torch.Generator().manual_seed(0)
    clients = [
        {"w": torch.rand(30_000, generator=generator, dtype=torch.float64) * 2 - 1}
        for _ in range(10)
    ]
    weights = [float(i + 1) for i in range(10)]
    manifest = Manifest.of(clients[0], bounds=1.0, max_weight=10.0)
    mean = average(KEYS[preset], manifest, clients, weights, rounding=rounding)["w"]
    nearest = rounding == "nearest"
    bound = worst_error(1.0, KEYS[preset], weights, max_weight=10.0, nearest=nearest)
    error = (mean - plain(clients, weights, "w")).abs().max()
    assert mean.dtype == torch.float64
    assert 0.05 * bound < error <= bound * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("pattern", ["all", "alternating", "one"])
def test_sums_at_the_bound_do_not_overflow(preset, pattern):
    values = torch.ones(20_000, dtype=torch.float64)
    if pattern == "alternating":
        values[::2] = -1
    elif pattern == "one":
        values[1:] = 0
    manifest = Manifest.of({"w": values}, bounds=1.0)
    mean = average(KEYS[preset], manifest, [{"w": values}] * 10, [1.0] * 10)["w"]
    assert torch.allclose(mean, values, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_sums_of_quantised_values_are_exact(preset):
    keys = KEYS[preset]
    levels = keys.layout.levels
    rng = np.random.default_rng(0)
    integers = [torch.from_numpy(rng.integers(-levels, levels + 1, 50_000)) for _ in range(10)]
    clients = [{"w": i.double() / levels} for i in integers]
    manifest = Manifest.of(clients[0], bounds=1.0)
    mean = average(keys, manifest, clients, [1.0] * 10, rounding="nearest")["w"]
    assert torch.equal((mean * levels * 10).round().long(), sum(integers))


@pytest.mark.parametrize(
    ("preset", "count"),
    [("many", 100), pytest.param("precise", 1000, marks=pytest.mark.slow)],
)
def test_as_many_clients_as_a_preset_takes_sum_exactly(preset, count):
    keys = KeySet.generate(preset=preset, max_clients=count, server=SERVER)
    levels = keys.layout.levels
    rng = np.random.default_rng(1)
    integers = [torch.from_numpy(rng.integers(-levels, levels + 1, 500)) for _ in range(count)]
    for each in integers:
        each[:3] = torch.tensor([levels, -levels, 0])  # all clients at their bounds
    clients = [{"w": i.double() / levels} for i in integers]
    manifest = Manifest.of(clients[0], bounds=1.0)
    mean = average(keys, manifest, clients, [1.0] * count, rounding="nearest")["w"]
    assert torch.equal((mean * levels * count).round().long(), sum(integers))


shapes = st.lists(st.integers(0, 7), min_size=0, max_size=4).map(tuple)
kinds = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(shapes, kinds), min_size=1, max_size=4), st.integers(0, 99))
def test_round_trips_over_shapes_and_types_with_empty_and_scalar_tensors(parts, seed):
    generator = torch.Generator().manual_seed(seed)
    clients = [
        {
            str(i): (torch.rand(shape, generator=generator) * 2 - 1).to(kind)
            for i, (shape, kind) in enumerate(parts)
        }
        for _ in range(2)
    ]
    manifest = Manifest.of(clients[0], bounds=1.0)
    mean = average(KEYS["quantised"], manifest, clients, [1.0, 0.5])
    bound = worst_error(1.0, KEYS["quantised"], [1.0, 0.5])
    for name, tensor in clients[0].items():
        assert mean[name].shape == tensor.shape
        wanted = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        assert mean[name].dtype == wanted
        difference = (mean[name].double() - plain(clients, [1.0, 0.5], name)).abs()
        assert difference.numel() == 0 or difference.max() <= bound + 1e-7


def test_a_tensor_longer_than_one_ciphertext_keeps_its_order():
    values = torch.linspace(-1, 1, 8188 * 2 + 5)
    manifest = Manifest.of({"w": values, "x": values.flip(0)}, bounds=1.0)
    client = {"w": values, "x": values.flip(0)}
    mean = average(KEYS["quantised"], manifest, [client] * 2, [1.0, 1.0])
    assert torch.allclose(mean["w"], values, atol=1e-4)
    assert torch.allclose(mean["x"], values.flip(0), atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.0001, -7.0])
def test_values_beyond_the_bound_are_refused_or_clipped_and_counted_as_chosen(bad):
    tensors = {"w": torch.tensor([0.25, bad, -0.5])}
    manifest = Manifest.of(tensors, bounds=1.0)
    encryptor = Encryptor(KEYS["quantised"], manifest, client_id="a")
    with pytest.raises(InputError, match=r"finite values of w within its bound 1, got 1 others"):
        encryptor.encrypt(tensors, round_id=0)
    encryptor = Encryptor(KEYS["quantised"], manifest, client_id="a", outliers="clip")
    encryptor.encrypt(tensors, round_id=0)
    assert encryptor.clipped == {"w": 1}
    mean = average(KEYS["quantised"], manifest, [tensors] * 2, [1.0, 1.0], outliers="clip")["w"]
    replaced = 0.0 if bad != bad else max(-1.0, min(1.0, bad))
    assert torch.allclose(mean, torch.tensor([0.25, replaced, -0.5]), atol=1e-4)


def test_stochastic_rounding_is_unbiased():
    step = 1 / KEYS["compact"].layout.levels
    values = torch.full((40_000,), 0.3 * step, dtype=torch.float64)
    manifest = Manifest.of({"w": values}, bounds=1.0)
    nearest = average(KEYS["compact"], manifest, [{"w": values}] * 2, [1, 1], rounding="nearest")
    assert (nearest["w"] == 0).all()
    mean = average(KEYS["compact"], manifest, [{"w": values}] * 2, [1, 1])["w"]
    assert abs(mean.mean() / step - 0.3) < 0.01


def test_two_messages_of_one_update_share_no_ciphertext():
    tensors = {"w": torch.ones(100)}
    manifest = Manifest.of(tensors, bounds=1.0)
    encryptor = Encryptor(KEYS["quantised"], manifest, client_id="a", rounding="nearest")
    first, second = (encryptor.encrypt(tensors, round_id=0) for _ in range(2))
    assert first[200:400] != second[200:400]
    assert first[106:122] != second[106:122]  # the nonces


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5, float("nan"), float("inf")])
def test_weights_outside_the_manifest_are_refused(weight):
    tensors = {"w": torch.ones(1)}
    encryptor = Encryptor(KEYS["quantised"], Manifest.of(tensors, bounds=1.0), client_id="a")
    with pytest.raises(InputError, match="Expected a weight above 0 and up to"):
        encryptor.encrypt(tensors, round_id=0, weight=weight)


def test_a_round_number_beside_a_started_round_keeps_its_weight_and_base(run):
    aggregator = run.aggregator(round_id=7, base="v2")
    started = Encryptor(run.keys, run.manifest, client_id="a")
    started.start_round(7, weight=3.0, base="v2")
    aggregator.add(started.encrypt(run.tensors(), round_id=7))
    with rounds.bound(rounds.Round(7, "v2", 2.0)):
        bound = Encryptor(run.keys, run.manifest, client_id="b")
        aggregator.add(bound.encrypt(run.tensors(), round_id=7))
        other = Encryptor(run.keys, run.manifest, client_id="c")
        aggregator.add(other.encrypt(run.tensors(), round_id=7, weight=1.5))
    assert aggregator.weights == {"a": 3.0, "b": 2.0, "c": 1.5}


def test_a_round_number_beside_another_round_or_client_is_refused(run):
    encryptor = Encryptor(run.keys, run.manifest, client_id="a")
    encryptor.start_round(7, weight=3.0)
    with pytest.raises(InputError, match="one round, 7 by start_round, got round_id=8"):
        encryptor.encrypt(run.tensors(), round_id=8)
    encryptor = Encryptor(run.keys, run.manifest, client_id="a")
    with (
        rounds.bound(rounds.Round(6, "v1")),
        pytest.raises(InputError, match=r"one round, 6 by Guard\.round, got round_id=8"),
    ):
        encryptor.encrypt(run.tensors(), round_id=8)
    with (
        rounds.bound(rounds.Round(8, "v1", client="b")),
        pytest.raises(InputError, match="a round of client 'a'"),
    ):
        encryptor.encrypt(run.tensors(), round_id=8)


@pytest.mark.parametrize("given", [None, "keys.json", b"keys", "server", "manifest"])
def test_keys_of_another_kind_are_refused_when_the_encryptor_is_made(run, given):
    keys = {"server": run.keys.for_server(), "manifest": run.manifest}.get(given, given)
    with pytest.raises(InputError, match="Expected a client's keys, got"):
        Encryptor(keys, run.manifest, client_id="a")


def test_a_manifest_as_text_is_refused_with_how_to_read_it(run):
    for text in (run.manifest.to_json(), None, run.template):
        with pytest.raises(InputError, match=r"Manifest\.from_json"):
            Encryptor(run.keys, text, client_id="a")
        with pytest.raises(InputError, match=r"Manifest\.from_json"):
            Decryptor(run.keys, text)
        with pytest.raises(InputError, match=r"Manifest\.from_json"):
            run.aggregator(manifest=text or 5)


def test_the_worst_error_refuses_weights_that_no_client_may_have():
    keys = KEYS["quantised"]
    assert worst_error(0.1, keys, [50, 50], max_weight=100) == pytest.approx(
        200 / 100 * 0.1 / keys.layout.levels
    )
    with pytest.raises(InputError, match=r"up to max_weight 1.0, got 50.*max_weight=manifest"):
        worst_error(0.1, keys, [50, 50])
    for weights in ([], [0, 1], [-1.0], [float("nan")]):
        with pytest.raises(InputError, match="weights above 0"):
            worst_error(0.1, keys, weights)
    for bound in (0, -0.1, float("nan"), float("inf"), "0.1"):
        with pytest.raises(InputError, match="a finite bound"):
            worst_error(bound, keys, [1.0])


def test_seal_makes_the_tensors_unreadable_and_carries_the_message():
    tensors = {"w": torch.ones(4), "plain": torch.ones(2)}
    manifest = Manifest.of(tensors, ["w"], bounds=1.0)
    encryptor = Encryptor(KEYS["quantised"], manifest, client_id="a")
    with pytest.raises(InputError, match="a round number"):
        encryptor.seal(Update(tensors=tensors))
    encryptor.start_round(3, weight=0.5, base="v")
    sealed = encryptor.seal(Update(tensors=tensors))
    with pytest.raises(Blocked, match="encrypted"):
        sealed.read("w")
    assert torch.equal(sealed.read("plain"), torch.ones(2))
    server = KEYS["quantised"].for_server()
    aggregator = Aggregator(server, manifest, signing=SIGNING, round_id=3, base="v")
    aggregator.add(sealed.payloads["encryption"])
    assert aggregator.clients == ("a",)


@pytest.mark.parametrize(
    "settings_",
    [{"outliers": "drop"}, {"rounding": "up"}, {"client_id": ""}, {"client_id": "x" * 65}],
)
def test_wrong_settings_are_refused(settings_):
    manifest = Manifest.of({"w": torch.ones(1)}, bounds=1.0)
    with pytest.raises(InputError):
        Encryptor(KEYS["quantised"], manifest, **{"client_id": "a", **settings_})
    with pytest.raises(InputError, match="min_clients"):
        Decryptor(KEYS["quantised"], manifest, min_clients=1)
