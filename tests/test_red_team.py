"""Attacks on the claims of docs/security.md by calls, values and orders that nobody planned for."""

import contextlib
import math
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.defenses.privacy.privacy_models import build
from vitguard.core import Batch, Update
from vitguard.defenses.encryption import (
    Aggregator,
    Decryptor,
    Encryptor,
    KeySet,
    Manifest,
    SigningKey,
)
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.defenses.privacy.accounting import Ledger, gaussian_epsilon
from vitguard.defenses.privacy.tape import Products
from vitguard.draws import Draws
from vitguard.errors import Incompatible, InputError, Unprotected
from vitguard.guard import protect

pytest.importorskip("opacus")


def prepared(*, noise=1.0, clip=1.0, dtype=torch.float32, **settings):
    torch.manual_seed(5)
    data = TensorDataset(torch.randn(24, 3, 32, 32, dtype=dtype), torch.randint(0, 10, (24,)))
    model = build("vit", dtype)
    guard = protect(model, [DifferentialPrivacy(noise=noise, clip=clip, delta=1e-3, **settings)])
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer, loader = guard.prepare(plain, DataLoader(data, batch_size=6))
    return model, guard, plain, optimizer, loader


def learn(model, images, labels):
    F.cross_entropy(model(images), labels).backward()


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


# prepare that is refused half-way


@contextlib.contextmanager
def examples_meet(model):
    hook = model.blocks[0].register_forward_hook(lambda module, _, out: out - out.mean(0))
    try:
        yield
    finally:
        hook.remove()


def test_a_second_prepare_that_is_refused_leaves_no_way_to_a_plain_step():
    model, guard, plain, optimizer, loader = prepared()
    with examples_meet(model), pytest.raises(Incompatible):
        guard.prepare(optimizer, loader)
    before = weights(model)
    with pytest.raises(Unprotected):
        learn(model, torch.randn(4, 3, 32, 32), torch.arange(4))
        plain.step()
    assert torch.equal(weights(model), before)


@pytest.mark.slow
def test_training_goes_on_after_a_second_prepare_that_was_refused():
    model, guard, _, optimizer, loader = prepared()
    images, labels = next(iter(loader))
    learn(model, images, labels)
    with examples_meet(model), pytest.raises(Incompatible):
        guard.prepare(optimizer, loader)
    optimizer.step()
    optimizer.zero_grad()
    for images, labels in loader:
        learn(model, images, labels)
        optimizer.step()
        optimizer.zero_grad()
    assert guard.privacy_spent().steps == 5


# gradients that come around the clipping


@pytest.mark.slow
def test_a_plain_gradient_on_a_parameter_frozen_since_is_not_stepped_on():
    model, _, _, optimizer, loader = prepared(noise=0.0, clip=1e-9)
    images, labels = next(iter(loader))
    model.eval()
    learn(model, images, labels)
    model.train()
    frozen = model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = p.grad if p is frozen else None
    before = weights(model)
    learn(model, images, labels)
    with pytest.raises(Unprotected, match="around"):
        optimizer.step()
    assert torch.equal(weights(model), before)


def difference(model, before):
    tensors = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    return Update(tensors, kind="difference", batch_size=4, learning_rate=0.1)


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
@pytest.mark.parametrize("way", ["eval mode", "around the forward", "torch.autograd.grad"])
def test_plain_training_beside_a_prepared_optimizer_is_not_sealed(way, engine):
    model, guard, *_ = prepared(engine=engine)
    other = torch.optim.SGD(model.parameters(), lr=0.1)  # made after prepare
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    if way == "around the forward":
        outputs = model.forward_head(model.forward_features(images))
    else:
        outputs = model.eval()(images)
    loss, trained = F.cross_entropy(outputs, labels), list(model.parameters())
    if way == "torch.autograd.grad":
        found = torch.autograd.grad(loss, trained)
    else:
        loss.backward()
        with pytest.raises(Unprotected, match="neither noised nor counted"):
            other.step()
        found = [p.grad for p in trained]
    with torch.no_grad():  # a step that nobody watches
        for p, gradient in zip(trained, found, strict=True):
            p -= 0.1 * gradient
    with pytest.raises(Unprotected, match="plain"):
        guard.seal(difference(model, before))
    model.load_state_dict(before, strict=False)
    guard.seal(difference(model, before))


def test_a_plain_gradient_that_is_taken_before_prepare_is_not_sealed_however_it_is_taken():
    model = build("vit", torch.float32)
    guard = protect(model, [DifferentialPrivacy(noise=1.0, delta=1e-3)])
    trained, before = list(model.parameters()), weights(model)
    loss = F.cross_entropy(model.eval()(torch.randn(4, 3, 32, 32)), torch.arange(4))
    with torch.no_grad():
        for p, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            p -= 0.1 * gradient
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=4))
    assert not torch.equal(weights(model), before)
    with pytest.raises(Unprotected, match="plain"):
        guard.seal(Update({}, kind="difference", batch_size=4, learning_rate=0.1))


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_private_training_with_evaluation_between_is_sealed(engine):
    model, guard, _, optimizer, loader = prepared(engine=engine)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for images, labels in loader:
        learn(model, images, labels)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        model(images)
        model.train()
    guard.update(images, labels)
    guard.seal(difference(model, before))


def test_freezing_a_part_between_steps_trains_the_rest():
    model, _, _, optimizer, loader = prepared()
    frozen = model.blocks[0].mlp.fc1.weight
    for number, (images, labels) in enumerate(loader):
        frozen.requires_grad_(number != 1)
        before = frozen.detach().clone()
        learn(model, images, labels)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(frozen, before) == (number == 1)


@pytest.mark.slow
def test_noise_asked_for_by_hand_is_in_the_ledger():
    model, guard, _, optimizer, loader = prepared()
    learn(model, *next(iter(loader)))
    optimizer.clip_and_accumulate()
    optimizer.add_noise()
    assert model.head.weight.grad is not None
    assert guard.privacy_spent().steps == 1


# a loader changed after it was prepared


@pytest.mark.parametrize(
    "change",
    [
        lambda loader: setattr(loader, "rate", 1e-6),
        lambda loader: setattr(loader.sampler, "rate", 1.0),
        lambda loader: setattr(loader, "batch_size", 2),
        lambda loader: setattr(loader, "dataset", [1, 2]),
        lambda loader: setattr(loader, "sampler", range(6)),
        lambda loader: setattr(loader.batch_sampler, "steps", 1),
    ],
)
def test_a_prepared_loader_cannot_be_changed_behind_the_ledger(change):
    *_, loader = prepared()
    with pytest.raises(Incompatible, match=r"guard\.prepare"):
        change(loader)


# sums that are less exact than the noise supposes


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_trainable_parameters_in_half_precision_are_refused(kind):
    with pytest.raises(Incompatible, match="float32"):
        protect(build("vit", kind), [DifferentialPrivacy(noise=1.0)])


def test_frozen_parameters_in_half_precision_are_not():
    model = build("vit", torch.float32)
    model.norm.requires_grad_(False).to(torch.bfloat16)
    protect(model, [DifferentialPrivacy(noise=1.0)])


class Centred(nn.Module):
    """Tokens less their mean: the gradients of an example's tokens cancel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(192, 192, bias=False)
        self.head = nn.Linear(192, 10).requires_grad_(False)

    def forward(self, images):
        patches = F.unfold(images, 8, stride=8).mT
        tokens = self.embed(patches)
        return self.head((tokens - tokens.mean(1, keepdim=True)).tanh().mean(1))


@pytest.mark.parametrize("brightness", [0.0, 10.0, 1e3, 5e3, 1e5])
def test_a_bright_image_whose_token_gradients_cancel_is_clipped(brightness):
    model = Centred()
    image = brightness + torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    defense = DifferentialPrivacy(noise=0.0, clip=1e-3)

    def loss(outputs, labels):
        return 1e3 * F.cross_entropy(outputs, labels)

    sums = defense.clipped_sum(model, loss, Batch(image, torch.tensor([3])))
    assert float(sums["embed.weight"].double().norm()) <= 1e-3 * 1.0001


@pytest.mark.parametrize("common", [0.0, 1.0, 10.0, 1e3])
def test_norms_from_factors_are_those_of_the_formed_gradient(common):
    torch.manual_seed(0)
    inputs = common * torch.randn(3, 1, 64) + 1e-2 * torch.randn(3, 17, 64)
    outputs = torch.randn(3, 17, 64)
    outputs = outputs - outputs.mean(1, keepdim=True)
    products = Products(inputs, outputs, torch.Size((64, 64)))
    exact = torch.bmm(outputs.double().mT, inputs.double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(products.squared_norms().sqrt().double(), exact, rtol=1e-3, atol=0)


# the ledger between threads and forks


def test_no_moment_of_a_record_shows_fewer_releases():
    ledger = Ledger([(1.0, 0.1, 1000)])
    seen = []

    def look(frame, event, arg):
        seen.append(sum(steps for run in ledger._runs.values() for _, _, steps in run))
        return look

    sys.settrace(look)
    try:
        ledger.record(1.0, 0.1)
    finally:
        sys.settrace(None)
    assert min(seen) >= 1000 and ledger.steps == 1001


def test_threads_of_a_fork_that_meet_at_its_first_record_share_one_lock():
    ledger = Ledger([(1.0, 0.1, 10)])
    ledger._process = -1  # as in a fork
    locks, begin = [], ledger._begin

    def slowly():
        if not locks:  # another thread comes while the first one begins
            locks.append(None)
            other = threading.Thread(target=lambda: locks.append(ledger.locked()))
            other.start()
            other.join(0.2)  # it waits for the first, or has made a lock of its own
            begin()
            started.append(other)
        else:
            begin()

    started = []
    ledger._begin = slowly
    mine = ledger.locked()
    started[0].join()
    assert mine is ledger._lock and locks[1] is mine


# epsilon at the ends of what floats hold


@pytest.mark.parametrize("rate", [1.0, 0.01, 1e-9])
@pytest.mark.parametrize(
    "noise", [5e-324, 1e-310, 1e-200, 1e-160, 1e-20, 1e-10, 1e-5, 1e5, 1e8, 1e160, 1e300]
)
def test_epsilon_is_a_number_whatever_the_noise(noise, rate):
    ledger = Ledger([(noise, rate, 10)])
    epsilon = ledger.spent(1e-5).epsilon
    assert epsilon >= 0  # false for NaN
    if noise <= 1e-5:
        assert epsilon > 1e6
    if noise >= 1e5:
        assert epsilon < 1e-2


def test_epsilon_grows_with_the_signal_up_to_infinity():
    values = [gaussian_epsilon(10.0**k, 1e-5) for k in range(-10, 200, 5)]
    assert values == sorted(values) and values[-1] >= 1e300
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf


@pytest.mark.parametrize("deviation", [5e-324, 1e-310, 1e-305])
def test_noise_too_small_for_its_grid_is_refused(deviation):
    with pytest.raises(InputError, match="deviation"):
        Draws().noised(torch.tensor([0.0, 1.0]), deviation)


# arguments of the wrong kind on the encrypted side


@pytest.fixture(scope="module")
def parties():
    pytest.importorskip("tenseal")
    signing = SigningKey.generate()
    keys = KeySet.generate(max_clients=3, server=signing.public_bytes())
    return signing, keys, Manifest.of({"a": torch.zeros(3)}, bounds=1.0)


@pytest.mark.parametrize("fewest", [math.nan, 1, 2.5, True, "2", None])
def test_no_kind_of_min_clients_gives_a_sum_of_fewer_than_two(parties, fewest):
    signing, keys, manifest = parties
    aggregator = Aggregator(keys.for_server(), manifest, signing=signing, round_id=1)
    with pytest.raises(InputError, match="min_clients"):
        aggregator.finish(min_clients=fewest)


@pytest.mark.parametrize("base", [None, b"v1", 5])
def test_a_base_that_is_no_text_is_an_input_error(parties, base):
    _, keys, manifest = parties
    encryptor = Encryptor(keys, manifest, client_id="a")
    with pytest.raises(InputError, match="version of the public model"):
        encryptor.start_round(1, base=base)
        encryptor.encrypt({"a": torch.zeros(3)})


def test_a_round_number_that_is_text_is_shown_as_text(parties):
    _, keys, manifest = parties
    with pytest.raises(InputError, match="'1'"):
        Encryptor(keys, manifest, client_id="a").encrypt({"a": torch.zeros(3)}, round_id="1")


@pytest.mark.parametrize("first, last", [(0, 0), (1, 0), (0, 0x80), (0xEC, 0x7F), (0xED, 0xFF)])
def test_a_verification_key_under_which_anybody_can_sign_is_refused(first, last):
    middle = b"\xff" if last & 0x7F else b"\0"
    weak = bytes([first]) + 30 * middle + bytes([last])
    keys = KeySet.generate()
    with pytest.raises(InputError, match="anybody can sign"):
        keys.trusting(weak)
    keys.trusting(SigningKey.generate().public_bytes())


@pytest.mark.parametrize("clients", [2.5, float("nan"), "2", True])
def test_a_fewest_number_of_clients_that_is_no_number_of_clients_is_refused(clients):
    manifest = Manifest.of({"w": torch.zeros(3)}, bounds=1.0)
    keys = KeySet.generate(server=SigningKey.generate().public_bytes())
    with pytest.raises(InputError, match="whole min_clients"):
        Decryptor(keys, manifest, min_clients=clients)
