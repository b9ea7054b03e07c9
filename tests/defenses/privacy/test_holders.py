"""A private batch is cut, blanked and looked at whatever holds its tensors."""

from collections import UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

import vitguard as vg
from tests.fast import fast_for
from vitguard.errors import Incompatible, InputError

pytest.importorskip("opacus")
STACK = "privacy:noise=0.5,clip=1,delta=0.01,accountant=rdp,physical_batch=2"
IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, torch.arange(12) % 10)


class Feature(UserDict):
    """As transformers' BatchFeature: a mapping that is no dictionary, with attributes."""

    def __getattr__(self, name):
        return self.data[name]


@dataclass
class Record:
    images: Any
    labels: Any
    count: Any = field(init=False, default=0)


Pair = namedtuple("Pair", "images labels")


class Plain:
    """As people write it."""

    def __init__(self, images, labels):
        self.images, self.labels, self.owner = images, labels, self  # a circle


@dataclass(frozen=True)
class Frozen:
    images: Any
    labels: Any


class Opaque:
    """Holds tensors where nothing can find them."""

    __slots__ = ("images", "labels")

    def __init__(self, images, labels):
        self.images, self.labels = images, labels


HOLDERS = {
    "tuple": (tuple, lambda b: b),
    "named tuple": (lambda b: Pair(*b), lambda b: (b.images, b.labels)),
    "dictionary": (lambda b: dict(zip("xy", b, strict=True)), lambda b: (b["x"], b["y"])),
    "mapping": (lambda b: Feature(x=b[0], y=b[1]), lambda b: (b.x, b["y"])),
    "dataclass": (lambda b: Record(*b), lambda b: (b.images, b.labels)),
    "frozen dataclass": (lambda b: Frozen(*b), lambda b: (b.images, b.labels)),
    "object": (lambda b: Plain(*b), lambda b: (b.images, b.labels)),
    "arrays": (
        lambda b: tuple(t.numpy() for t in b), lambda b: tuple(map(torch.from_numpy, b)),
    ),
    "mapping in a list": (lambda b: [Feature(x=b[0]), b[1]], lambda b: (b[0].x, b[1])),
}  # fmt: skip


def trained(model, collate, opened, stack=STACK):
    guard = vg.protect(model, stack, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer, loader = guard.prepare(optimizer, DataLoader(DATA, 4, collate_fn=collate))
    sizes = []
    for batch in loader:
        images, labels = opened(batch)
        sizes.append(len(images))
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return guard, sizes


@pytest.mark.parametrize(
    "holder", fast_for(HOLDERS, fast=["tuple", "dictionary", "object", "arrays"])
)
def test_a_large_batch_comes_in_pieces_whatever_holds_it(small_vit, holder):
    wrap, opened = HOLDERS[holder]
    guard, sizes = trained(small_vit(), lambda e: wrap(default_collate(e)), opened)
    plain, same = trained(small_vit(), default_collate, lambda b: b)
    assert sizes == same and max(sizes) == 2 and len(sizes) > 3 == guard.privacy_spent().steps
    for name, p in guard.model.named_parameters():
        assert torch.equal(p, plain.model.get_parameter(name))


def test_what_cannot_be_cut_is_told_with_its_kind(small_vit):
    with pytest.raises(Incompatible, match=r"got a Opaque without any. Return tensors in"):
        trained(small_vit(), lambda e: Opaque(*default_collate(e)), lambda b: (b.images, b.labels))
    with pytest.raises(InputError, match=r"got tensors of \d+, \d+, 0 in a list"):
        trained(small_vit(), lambda e: [*default_collate(e), torch.tensor(1.0)], lambda b: b[:2])


@pytest.mark.parametrize("holder", HOLDERS)
def test_an_empty_batch_is_blank_whatever_holds_it(small_vit, holder):
    wrap, opened = HOLDERS[holder]
    model = small_vit()
    guard = vg.protect(model, STACK)
    made = guard.prepare(
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(DATA, 4, collate_fn=lambda e: wrap(default_collate(e))),
    )
    real, blank = made[1]._loader.collate_fn([])
    images, labels = opened(blank)
    assert real == 0 and images.shape == (1, 3, 16, 16)
    assert not images.any() and not labels.any()


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_collate_function_that_mixes_is_refused_whatever_holds_the_batch(small_vit, holder):
    def mixing(examples):
        images, labels = default_collate(examples)
        return HOLDERS[holder][0]((images - images.mean(0), labels))

    with pytest.raises(Incompatible, match="mixes examples"):
        trained(small_vit(), mixing, HOLDERS[holder][1])
