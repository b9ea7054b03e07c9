"""Mixup and CutMix in a collate function or in the loop, of any library, are refused under DP."""

import os
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import FastCollateMixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

import vitguard as vg
from tests.conftest import CHECKED
from vitguard.core import Batch
from vitguard.defenses.base import BatchDefense
from vitguard.defenses.privacy.mixing import refuse_mixed_targets
from vitguard.errors import Incompatible, Unprotected
from vitguard.registry import parse_stack

pytest.importorskip("opacus")
STACK = "privacy:noise=1,clip=1,delta=0.01,accountant=rdp"
DATA = TensorDataset(
    torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 10
)


def prepared(model, **loader):
    guard = vg.protect(model, STACK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return guard.prepare(optimizer, DataLoader(DATA, 12, **loader))


def torchvision_mix(kind):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    return getattr(v2, kind)(alpha=9.0, num_classes=10)


def half_the_time(mix):
    def collate(examples):
        batch = default_collate(examples)
        return mix(*batch) if torch.rand(()) < 0.5 else batch

    return collate


def erased(examples):
    """One example at a time, at random: allowed."""
    images, labels = default_collate(examples)
    images[torch.rand(images.shape) < 0.5] = 0
    return {"pixel_values": images, "labels": labels}


COLLATES = {
    "torchvision's CutMix": lambda: lambda e: torchvision_mix("CutMix")(*default_collate(e)),
    "torchvision's MixUp, half the time": lambda: half_the_time(torchvision_mix("MixUp")),
    "timm's Mixup": lambda: lambda e: Mixup(num_classes=10)(*default_collate(e)),
    "the mean image taken off": lambda: lambda e: (
        (b := default_collate(e))[0] - b[0].mean(0), b[1]
    ),
}  # fmt: skip


def test_trying_a_collate_function_out_leaves_the_generators_of_accelerators_alone(monkeypatch):
    from vitguard.defenses.privacy.mixing import refuse_mixing_collate

    seeded, state = [], torch.random.get_rng_state()
    for kind in (torch.cuda, torch.xpu):
        monkeypatch.setattr(kind, "manual_seed_all", seeded.append)
    refuse_mixing_collate(erased, DATA, range(24))
    assert seeded == [] and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", COLLATES)
def test_a_collate_function_that_mixes_records_is_refused_by_prepare(small_vit, kind):
    with pytest.raises(Incompatible, match="mixes examples"):
        prepared(small_vit(depth=1), collate_fn=COLLATES[kind]())


class Read(Dataset):
    """Reads a batch at once, as data sets of the hub do."""

    def __init__(self, change=lambda images: images):
        self.change = change

    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        images = self.change(DATA.tensors[0][torch.tensor(indices)])
        return [(image, DATA.tensors[1][i]) for image, i in zip(images, indices, strict=True)]


READ_MIXED = {
    "the mean image taken off": lambda b: b - b.mean(0) if len(b) > 1 else b,
    "half of the next one": lambda b: (b + b.roll(-1, 0)) / 2,
    "now and then": lambda b: b.flip(0) if torch.rand(()) < 0.5 else b,
}
READ_ALONE = {
    "nothing": lambda b: b,
    "flips": lambda b: torch.where(torch.rand(len(b), 1, 1, 1) < 0.5, b.flip(-1), b),
    "noise of a generator of its own": lambda b: b + torch.randn(
        b.shape, generator=torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
    ),
}  # fmt: skip


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("kind", [*READ_MIXED, *READ_ALONE])
def test_a_data_set_that_mixes_the_records_that_it_reads_at_once_is_refused(small_vit, kind, part):
    data = Read({**READ_MIXED, **READ_ALONE}[kind])
    loader = DataLoader(Subset(data, range(3, 21)) if part else data, 6)
    guard = vg.protect(model := small_vit(), STACK)
    prepare = partial(guard.prepare, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    if kind in READ_ALONE:
        return prepare()
    with pytest.raises(
        Incompatible, match="a data set and collate function that keep each example"
    ):
        prepare()


class NeverEmpty(Read):
    """Cannot read an empty batch, as transforms that stack cannot."""

    def __getitems__(self, indices):
        torch.stack([DATA.tensors[0][i] for i in indices])
        return super().__getitems__(indices)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_reads_batches_is_asked_for_no_empty_one(small_vit, workers):
    def look(number):
        assert torch.utils.data.get_worker_info().dataset.change is not None  # as without a guard

    given = DataLoader(NeverEmpty(), 1, num_workers=workers, worker_init_fn=look)
    guard = vg.protect(model := small_vit(depth=1), STACK)
    optimizer, loader = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1), given)
    for images, labels in loader:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert guard.privacy_spent().steps == len(DATA)


def test_timms_collate_with_mixup_is_refused(small_vit):
    images = [((DATA[i][0].numpy() * 10).astype("uint8"), int(DATA[i][1])) for i in range(24)]
    model = small_vit(depth=1)
    guard = vg.protect(model, STACK)
    loader = DataLoader(images, 12, collate_fn=FastCollateMixup(num_classes=10))
    with pytest.raises(Incompatible, match="mixes examples"):
        guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1), loader)


@dataclass(frozen=True)
class OfBatch(BatchDefense):
    """One of a third party."""

    name: ClassVar[str] = "of-batch"
    kind: str = "mixup"

    def transform(self, batch, draws):
        images, labels = batch.images, batch.labels
        if self.kind == "mixup":
            images = (images + images.roll(1, 0)) / 2
        elif self.kind == "now and then" and float(draws.uniform(1)[0]) < 0.3:
            images = (images + images.flip(0)) / 2
        elif self.kind == "by torch's generator" and float(torch.rand(())) < 0.3:
            images = images - images.mean(0)
        elif self.kind == "labels":
            labels = labels.roll(1)
        elif self.kind == "fewer":
            images, labels = images[:-1], labels[:-1]
        elif self.kind == "each alone":
            images = images.flip(-1) * torch.from_numpy(draws.uniform(len(images)))[
                :, None, None, None
            ].to(images)
        return Batch(images, labels)


@pytest.mark.parametrize("stack", ["privacy:noise=1", "sample-normalisation"])
@pytest.mark.parametrize(
    "kind", ["mixup", "now and then", "by torch's generator", "labels", "fewer"]
)
def test_a_defense_of_the_batch_that_mixes_examples_is_refused(small_vit, kind, stack):
    with pytest.raises(Incompatible, match="of-batch, which mixes"):
        vg.protect(small_vit(depth=1), [OfBatch(kind), *parse_stack(stack)])
    vg.protect(small_vit(depth=1), [OfBatch(kind), *parse_stack("client-privacy:noise=1")])


@pytest.mark.parametrize("stack", ["privacy:noise=1", "sample-normalisation:mode=clip"])
def test_a_defense_of_the_batch_that_takes_each_example_alone_is_taken(small_vit, stack):
    guard = vg.protect(small_vit(depth=1), [OfBatch("each alone"), *parse_stack(stack)])
    update = guard.update(torch.randn(2, 3, 16, 16), torch.tensor([1, 2]))
    assert update.batch_size == 2


def test_trying_a_collate_function_out_leaves_the_seeds_of_the_process_as_they_were(small_vit):
    import random

    import numpy as np

    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    model = small_vit(depth=1)
    guard = vg.protect(model, STACK)
    wanted = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    guard.prepare(
        torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(DATA, 12, collate_fn=erased)
    )
    assert (torch.rand(1), np.random.rand()) == wanted[:2]  # noqa: NPY002
    assert CHECKED or random.random() == wanted[2]


@pytest.mark.parametrize("classes", [4, 5, 10])
def test_classes_that_happen_to_be_as_likely_are_not_taken_for_a_mixed_target(classes):
    """An unsure model of few classes: two of them are equal to rounding in one row of sixteen."""
    torch.manual_seed(0)
    scores, labels = 0.3 * torch.randn(16, classes), torch.randint(classes, (16,))
    scores[1] = 0.03
    scores[1, :2], labels[1] = torch.tensor([0.12, 0.15]), 1
    scores.requires_grad_()
    F.cross_entropy(scores, labels).backward()
    refuse_mixed_targets(scores, scores.grad)
    share = 0.3
    soft = share * F.one_hot(labels, classes) + (1 - share) * F.one_hot(labels.roll(1), classes)
    (gradient,) = torch.autograd.grad(F.cross_entropy(scores, soft), scores)
    with pytest.raises(Unprotected, match="mix two"):
        refuse_mixed_targets(scores, gradient)


@pytest.mark.parametrize("classes", [4, 10, 100])
@pytest.mark.parametrize("sharp", [5, 20, 60])
def test_a_model_that_is_sure_of_two_classes_trains_on_labels_of_one(classes, sharp):
    """Its own chances are two classes above a flat rest, and so is any small part of a step."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (38,), generator=generator)
    both = F.one_hot(labels, classes) + F.one_hot((labels + 2) % classes, classes)
    near = 0.1 * torch.rand(38, classes, generator=generator)
    scores = sharp * torch.where(both > 0, near, torch.randn(38, classes, generator=generator) - 3)
    scores.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(scores, labels), scores)
    refuse_mixed_targets(scores, gradient)
    soft = 0.7 * F.one_hot(labels, classes) + 0.3 * F.one_hot((labels + 1) % classes, classes)
    (gradient,) = torch.autograd.grad(F.cross_entropy(scores, soft), scores)
    with pytest.raises(Unprotected, match="mix two"):
        refuse_mixed_targets(scores, gradient)


def weighted(outputs, one, other, share):
    return share * F.cross_entropy(outputs, one) + (1 - share) * F.cross_entropy(outputs, other)


def soft(mix):
    return lambda m, x, y: F.cross_entropy(m((b := mix(x, y))[0]), b[1])


MIXED = {
    "two criteria, weighted": lambda m, x, y: weighted(
        m(0.7 * x + 0.3 * x.flip(0)), y, y.flip(0), 0.7
    ),
    "timm's Mixup and soft targets": lambda m, x, y: SoftTargetCrossEntropy()(
        m((b := Mixup(num_classes=10, mixup_alpha=9.0)(x, y))[0]), b[1]
    ),
    "timm's Mixup and binary cross-entropy": lambda m, x, y: BinaryCrossEntropy()(
        m((b := Mixup(num_classes=10, mixup_alpha=9.0, label_smoothing=0.1)(x, y))[0]), b[1]
    ),
    "torchvision's CutMix": lambda m, x, y: soft(torchvision_mix("CutMix"))(m, x, y),
    "a sum in place of a mean": lambda m, x, y: F.cross_entropy(
        m(x), 0.6 * F.one_hot(y, 10).float() + 0.4 * F.one_hot(y.roll(1), 10), reduction="sum"
    ),
    "a scaled loss": lambda m, x, y: 0.37 * weighted(m(x), y, y.roll(1), 0.6),
}  # fmt: skip


def step(model, loss_of):
    """Step on the first batch whose pairs differ: timm mixes an even number of images."""
    optimizer, loader = prepared(model)
    while True:
        for images, labels in loader:
            if len(labels) % 2 or len(labels.unique()) < 4:
                loader.skip()
                continue
            loss_of(model, images, labels).backward()
            optimizer.step()
            return


@pytest.mark.parametrize("kind", MIXED)
def test_mixing_in_the_loop_is_refused_before_the_first_step(small_vit, kind):
    model = small_vit(depth=1)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(Unprotected, match="mix two"):
        step(model, MIXED[kind])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def teacher(m, x, y):
    return F.cross_entropy(m(x), torch.randn(len(x), 10).mul(2).softmax(1))


ALONE = {
    "labels": lambda m, x, y: F.cross_entropy(m(x), y),
    "smoothed labels": lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.1),
    "timm's smoothed labels": lambda m, x, y: LabelSmoothingCrossEntropy(0.2)(m(x), y),
    "one-hot labels": lambda m, x, y: F.cross_entropy(m(x), F.one_hot(y, 10).float()),
    "binary cross-entropy": lambda m, x, y: BinaryCrossEntropy(0.1)(m(x), y),
    "a teacher's chances": teacher,
    "a margin": lambda m, x, y: F.multi_margin_loss(m(x), y),
    "a squared error": lambda m, x, y: F.mse_loss(m(x), F.one_hot(y, 10).float()),
    "a focal loss": lambda m, x, y: (
        (1 - F.cross_entropy(m(x), y, reduction="none").neg().exp()) ** 2
    ).mean(),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALONE)
def test_criteria_of_single_labels_pass(small_vit, kind):
    model = small_vit(depth=1)
    for p in model.head.parameters():
        p.data.mul_(20)
    for _ in range(2):
        vg.protect(model, STACK)
        optimizer, loader = vg.Guard.of(model).prepare(
            torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(DATA, 12)
        )
        for images, labels in loader:
            ALONE[kind](model, images, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        vg.Guard.of(model).remove()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_labels_of_few_classes_pass_smoothed_or_not(small_vit, classes, autocast):
    model = small_vit(depth=1, num_classes=classes)
    optimizer, loader = prepared(model)
    for images, labels in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(images)
        F.cross_entropy(outputs.float(), labels % classes, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()


def told(scores, targets, dtype):
    """Whether the gradient of the mean cross-entropy in this precision is refused."""
    scores = scores.to(dtype, copy=True).requires_grad_()
    F.cross_entropy(scores, targets.to(dtype)).backward()
    try:
        refuse_mixed_targets(scores, scores.grad)
    except Unprotected:
        return True
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0])
def test_targets_of_one_class_pass_in_any_precision_and_halves_of_two_do_not(dtype, spread):
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 2, 3, 8) * 10:
        scores = spread * torch.randn(batch, 10, generator=generator)
        one = torch.eye(10)[torch.randint(10, (batch,), generator=generator)]
        smooth = 0.9 * one + 0.01
        assert not told(scores, one, dtype) and not told(scores, smooth, dtype)
        mixed = 0.5 * one + 0.5 * one.roll(1, 1)
        if spread < 1:  # of a model that is sure already nothing is told
            assert told(scores, mixed, dtype)


def sets(rows, classes, seed=0):
    """Targets of one to four classes of each example."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, classes, generator=generator).argsort(1)
    return (order < torch.randint(1, 5, (rows, 1), generator=generator)).float()


def asked(scores, targets, form):
    """Whether a gradient is refused as one of mixed targets."""
    scores = scores.clone().requires_grad_()
    if form == "softmax":
        targets = targets / targets.sum(1, keepdim=True) if targets.max() == 1 else targets
        loss = F.cross_entropy(scores, targets)
    elif form == "classes summed":
        loss = F.binary_cross_entropy_with_logits(scores, targets, reduction="sum") / len(scores)
    else:
        loss = 0.3 * F.binary_cross_entropy_with_logits(scores, targets)
    loss.backward()
    try:
        refuse_mixed_targets(scores, scores.grad)
    except Unprotected:
        return True
    return False


@pytest.mark.parametrize("spread", [0.0, 0.5, 6.0])
@pytest.mark.parametrize("form", ["mean", "classes summed", "softmax"])
@pytest.mark.parametrize("classes", [10, 80])
def test_mixed_targets_of_several_classes_are_told_from_those_of_one_record(classes, form, spread):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        scores = spread * torch.randn(12, classes, generator=generator)
        one = sets(12, classes, seed)
        if form == "softmax":
            one = one / one.sum(1, keepdim=True)
        share = float(0.2 + 0.6 * torch.rand((), generator=generator))
        assert asked(scores, share * one + (1 - share) * one.roll(1, 0), form)
        assert asked(scores, share * one + (1 - share) * one.flip(0), form)
        assert not asked(scores, one, form)
        assert not asked(scores, 0.9 * one + 0.1 * one.mean(1, keepdim=True), form)
        assert not asked(scores, one.roll(1, 0) * 0.75 + one * 0.25, form)  # votes of four
        chances = scores.roll(1, 0) + torch.randn(12, classes, generator=generator)
        soft = chances.softmax(1) if form == "softmax" else chances.sigmoid()
        assert not asked(scores, soft, form)


def test_mixing_of_targets_of_several_classes_is_refused_in_the_loop(small_vit):
    def loss_of(model, images, labels):
        both = F.one_hot(labels, 10) + F.one_hot((labels + 3) % 10, 10).float()
        mixed = 0.63 * both + 0.37 * both.flip(0)
        return F.binary_cross_entropy_with_logits(model(images), mixed)

    with pytest.raises(Unprotected, match="mix two"):
        step(small_vit(depth=1), loss_of)
