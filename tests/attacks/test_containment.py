"""Containment: low-rank updates, each layer's rows inside the row space of its inputs."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from tests.conftest import CIFAR_NORMALIZATION
from vitguard.attacks.containment import Containment
from vitguard.attacks.ladder import Ladder
from vitguard.attacks.span.attack import SpanInversion
from vitguard.defenses.base import UpdateDefense
from vitguard.errors import NotApplicable
from vitguard.metrics import psnr
from vitguard.registry import parse_stack


@dataclass(frozen=True)
class LowRankUpdate(UpdateDefense):
    """A defense of a third party: each matrix cut to its strongest singular values."""

    name: ClassVar[str] = "low-rank-of-a-test"
    rank: int = 4

    def traits(self, before, anatomy):
        return replace(before, exact=False, rank=self.rank)

    def seal(self, update, anatomy, draws):
        return replace(update, tensors={n: self.cut(t) for n, t in update.tensors.items()})

    def mimic(self, dummy, seen):
        return {n: self.cut(t) for n, t in dummy.items()}

    def cut(self, tensor):
        if tensor.dim() < 2 or len(tensor) == 1:
            return tensor
        left, values, right = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
        r = self.rank
        return ((left[:, :r] * values[:r]) @ right[:r]).view_as(tensor)


def fixed(rank):
    return [*parse_stack("positions:kind=frozen"), LowRankUpdate(rank)]


def draw():
    return torch.Generator().manual_seed(0)


def crop(cifar, index, size=8):
    return cifar[0][index : index + 1, :, 8 : 8 + size, 8 : 8 + size], cifar[1][index : index + 1]


@pytest.fixture
def narrow(small_vit):
    """4 patches of 4 x 4 pixels: 192 unknowns."""
    return small_vit(img_size=8, depth=3, embed_dim=64)


@pytest.mark.parametrize("index", [1, 21])
def test_an_update_of_low_rank_gives_the_image_back(cifar, narrow, observe, index):
    pixels, labels = crop(cifar, index)
    control = observe(narrow, pixels, labels, defenses="positions:kind=frozen",
                      normalization=CIFAR_NORMALIZATION)  # fmt: skip
    assert float(psnr(SpanInversion().run(control, draw()).images, pixels)) > 60
    view = observe(narrow, pixels, labels, defenses=fixed(2), normalization=CIFAR_NORMALIZATION)
    guess = Containment().run(view, draw())
    assert float(psnr(guess.images, pixels)) > 60, guess.details
    assert bool(guess.verified.all()) and "unfinished" not in guess.details


def test_nothing_is_proved_on_an_unrelated_update_and_it_is_not_finished(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels, defenses=fixed(2))
    noise = draw()
    for name, tensor in view.update.tensors.items():
        view.update.tensors[name] = torch.randn(tensor.shape, generator=noise)
    guess = Containment(seconds=20).run(view, draw())
    assert not bool(guess.verified.any()) and guess.details["unfinished"]


def test_without_low_rank_it_costs_the_ladder_nothing(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    for defenses in ("none", "positions:kind=frozen", "noise:scale=0.1"):
        view = observe(narrow, pixels, labels, defenses=defenses)
        assert Containment().share(view) == 0
        with pytest.raises(NotApplicable, match="not of low rank"):
            Containment().run(view, draw())
    assert "containment" in Ladder().parts()


def test_batches_are_refused(photos, small_vit, observe):
    with pytest.raises(NotApplicable, match="batch"):
        Containment().run(observe(small_vit(), photos[:2], defenses=fixed(2)), draw())
