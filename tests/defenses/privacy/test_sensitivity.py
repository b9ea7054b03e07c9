"""The adversary's test: how far can one example move what is released before the noise?"""

import pytest
import timm.loss
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.defenses.privacy.privacy_models import KeyedDraws, build
from vitguard.core import Batch
from vitguard.defenses.positions import FixedPositions
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.guard import protect

CLIP = 0.7


def summed(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="sum")


CRITERIA = {
    "cross-entropy": F.cross_entropy,
    "module": nn.CrossEntropyLoss(label_smoothing=0.1),
    "timm-label-smoothing": timm.loss.LabelSmoothingCrossEntropy(0.1),
    "soft-targets": timm.loss.SoftTargetCrossEntropy(),
    "class-weights": lambda outputs, labels: F.cross_entropy(
        outputs, labels, weight=torch.linspace(0.1, 5, 10).to(outputs), reduction="none"
    ).mean(),
    "sum": summed,
    "lambda": lambda outputs, labels: F.cross_entropy(outputs, labels),
}
STACKS = {
    "plain": [],
    "fixed": [FixedPositions("sincos")],
    "shuffle": [PatchShuffle(ratio=0.5, mask="uniform")],
    "shuffle-batch": [PatchShuffle(ratio=0.5, draw="batch")],
    "dal-tokens": [
        FixedPositions("sincos"),
        PatchShuffle(ratio=0.5, dal="tokens", dal_weight=0.5),
    ],
    "dal-positions": [PatchShuffle(ratio=0.5, dal="positions", dal_weight=0.5)],
}
MODELS = {
    "vit": lambda: build("vit"),
    "drop": lambda: build(
        "vit_tiny_patch16_224", drop_path_rate=0.3, proj_drop_rate=0.2, init_values=0.1
    ),
    "float32": lambda: build("vit", torch.float32),
}


def labels_for(criterion, count):
    labels = torch.randint(0, 10, (count,))
    return F.one_hot(labels, 10).double() if criterion == "soft-targets" else labels


def some(like):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(like)
    return images, torch.arange(3), torch.arange(3)


class Setup:
    """A protected model whose every draw is keyed to the example."""

    def __init__(self, model, stack, clipping):
        self.model = MODELS[model]()
        self.draws = KeyedDraws(self.model)
        self.defense = DifferentialPrivacy(clip=CLIP, noise=0.0, clipping=clipping)
        self.guard = protect(self.model, [*STACKS[stack], self.defense])
        self.per_batch = stack == "shuffle-batch"
        self.total(*some(next(self.model.parameters())), F.cross_entropy)  # the probe takes three

    def total(self, images, labels, keys, loss):
        self.draws.keys = keys
        for piece in self.model.vitguard.installed():
            if hasattr(piece, "key_examples"):
                piece.key_examples(torch.zeros_like(keys) if self.per_batch else keys)
        sums = self.defense.clipped_sum(self.model, loss, Batch(images, labels))
        return torch.cat([s.double().flatten() for s in sums.values()])


_SETUPS = {}


def prepared(*case):
    if case not in _SETUPS:
        _SETUPS[case] = Setup(*case)
    return _SETUPS[case]


CASES = given(
    model=st.sampled_from(sorted(MODELS)),
    stack=st.sampled_from(sorted(STACKS)),
    clipping=st.sampled_from(["flat", "automatic", "per_layer"]),
    criterion=st.sampled_from(sorted(CRITERIA)),
    count=st.integers(2, 6),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 10_000),
)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@CASES
def test_sum_of_clipped_gradients_moves_by_at_most_clip_when_one_example_leaves(**case):
    moves_by_at_most_clip(**case)


@pytest.mark.slow  # the test above on more models
@settings(max_examples=40, deadline=None, derandomize=True)
@CASES
def test_sums_of_many_models_move_by_at_most_clip(**case):
    moves_by_at_most_clip(**case)


def moves_by_at_most_clip(model, stack, clipping, criterion, count, scale, seed):
    ready = prepared(model, stack, clipping)
    torch.manual_seed(seed)
    dtype = next(ready.model.parameters()).dtype
    images = scale * torch.randn(count, 3, 32, 32, dtype=dtype)
    labels = labels_for(criterion, count)
    if labels.is_floating_point():
        labels = labels.to(dtype)
    keys = torch.randint(0, 2**20, (count,))
    loss = CRITERIA[criterion]
    whole = ready.total(images, labels, keys, loss)
    gone = seed % count
    rest = [i for i in range(count) if i != gone]
    without = ready.total(images[rest], labels[rest], keys[rest], loss)
    moved = (whole - without).norm()
    assert moved <= CLIP * (1 + 1e-5)
    assert whole.norm() <= CLIP * count * (1 + 1e-5)


@pytest.mark.slow
def test_an_example_with_a_large_gradient_moves_the_sum_by_exactly_clip():
    ready = prepared("vit", "plain", "flat")
    torch.manual_seed(1)
    images, labels = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2, 3])
    keys = torch.arange(3)
    loss = lambda outputs, y: 1e3 * F.cross_entropy(outputs, y)  # noqa: E731
    whole = ready.total(images, labels, keys, loss)
    without = ready.total(images[:2], labels[:2], keys[:2], loss)
    assert (whole - without).norm().item() == pytest.approx(CLIP, rel=1e-9)


def test_an_example_whose_gradient_overflows_contributes_nothing():
    ready = prepared("vit", "plain", "flat")
    torch.manual_seed(1)
    images, labels = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2, 3])
    images[1] = float("inf")
    keys = torch.arange(3)
    whole = ready.total(images, labels, keys, F.cross_entropy)
    without = ready.total(images[[0, 2]], labels[[0, 2]], keys[[0, 2]], F.cross_entropy)
    assert torch.isfinite(whole).all()
    assert (whole - without).norm() <= CLIP * (1 + 1e-5)
