"""What stands in the place of an optimizer, and models that are changed after `prepare`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

import vitguard as vg
from vitguard.errors import Incompatible, InputError

IMAGES, LABELS = torch.rand(12, 3, 32, 32), torch.arange(12) % 10
DATA = TensorDataset(IMAGES, LABELS)
PRIVATE = "privacy:noise=1,delta=0.001,accountant=rdp"


@pytest.fixture
def model(small_vit):
    return small_vit(img_size=32, patch_size=8, depth=1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


NO_OPTIMIZERS = {
    "the model": lambda m: m,
    "a loader": lambda m: DataLoader(DATA),
    "a list": lambda m: [sgd(m)],
    "a schedule": lambda m: torch.optim.lr_scheduler.StepLR(sgd(m), 1),
    "a class": lambda m: torch.optim.SGD,
}


@pytest.mark.parametrize("stack", ["shuffle:ratio=0.5", "noise", PRIVATE])
@pytest.mark.parametrize("kind", NO_OPTIMIZERS)
def test_what_is_no_optimizer_is_refused_in_words(model, stack, kind):
    guard = vg.protect(model, stack)
    with pytest.raises(InputError, match=r"an optimizer first, got \w+. Call guard.prepare"):
        guard.prepare(NO_OPTIMIZERS[kind](model), sgd(model))


@pytest.mark.parametrize("stack", ["shuffle:ratio=0.5", "noise", PRIVATE])
def test_an_optimizer_of_a_copy_is_refused(model, stack):
    other = sgd(copy.deepcopy(model))
    guard = vg.protect(model, stack)
    with pytest.raises(InputError, match="model's own parameters, got one of others alone"):
        guard.prepare(other, DataLoader(DATA, batch_size=4))
    sides = torch.nn.Linear(3, 3)
    wider = torch.optim.SGD([*model.parameters(), *sides.parameters()], lr=0.1)
    if stack != PRIVATE:  # there each gradient must be clipped, and the line says how
        assert guard.prepare(wider) is wider
        return
    with pytest.raises(Incompatible, match=r"A head beside the model must .*reset_classifier"):
        guard.prepare(wider, DataLoader(DATA, batch_size=4))


def test_an_empty_subset_is_called_empty(model):
    guard = vg.protect(model, PRIVATE)
    with pytest.raises(InputError, match="Subset of at least one record, got an empty one"):
        guard.prepare(sgd(model), DataLoader(Subset(DATA, []), batch_size=4))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_since_prepare_is_no_mixing_of_examples(model, kind):
    guard = vg.protect(model, PRIVATE)
    _, loader = guard.prepare(sgd(model), DataLoader(DATA, batch_size=4))
    model.to(kind)
    with pytest.raises(Incompatible, match=f"float32 or float64, got cls_token in {kind}"):
        for images, labels in loader:
            F.cross_entropy(model(images.to(kind)), labels).backward()
    assert guard.privacy_spent().steps == 0


def functional(model):
    held = {n: p.detach() for n, p in model.named_parameters()}
    rest = dict(model.named_buffers())

    def loss(weights, images, labels):
        return F.cross_entropy(torch.func.functional_call(model, (weights, rest), images), labels)

    return held, loss


def by_grad(model):
    held, loss = functional(model)
    torch.func.grad(loss)(held, IMAGES, LABELS)


def by_vmap(model):
    held, loss = functional(model)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0), randomness="different")
    each(held, IMAGES[:, None], LABELS[:, None])


def by_trace(model):
    torch.jit.trace(model, IMAGES, check_trace=False)


@pytest.mark.parametrize("way", [by_grad, by_vmap, by_trace])
def test_a_shuffle_inside_a_transform_is_refused_in_words_and_idle_in_eval(model, way):
    vg.protect(model, "shuffle:ratio=0.5")
    with pytest.raises(Incompatible, match=r"a transform of torch\.func or a trace"):
        way(model)
    way(model.eval())


def test_a_functional_call_outside_transforms_is_shuffled(model):
    guard = vg.protect(model, "shuffle:ratio=0.5")
    held, loss = functional(model)
    assert loss(held, IMAGES, LABELS).isfinite()
    assert guard.truth()["shuffled"].any()
