"""What the head's gradient shows: features of an image, and of batches smaller than the classes."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from tests.conftest import small_vit
from vitguard.core import Normalization


@pytest.fixture
def decoder(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("feature_decoder")


def taken_apart(decoder, batch, classes=6, width=32):
    """Return the relative error of the features that are read of a batch, and the misfit."""
    generator = torch.Generator().manual_seed(batch)
    centres, weight = (torch.randn(classes, width, generator=generator) for _ in range(2))
    weight, labels = 0.1 * weight, torch.arange(batch) % classes
    true = centres[labels] + 0.5 * torch.randn(batch, width, generator=generator)
    head = weight.double().requires_grad_()
    bias = torch.zeros(classes).double().requires_grad_()
    loss = F.cross_entropy(true.double() @ head.T + bias, labels)
    gradients = dict(zip(("weight", "bias"), torch.autograd.grad(loss, [head, bias]), strict=True))
    found, left = decoder.separated(weight, torch.zeros(classes), gradients, labels, centres)
    away = torch.cdist(found, true.double())
    pairs = linear_sum_assignment(away)
    return float((away[pairs] / true.norm(dim=1)[pairs[1]]).max()), left


def test_features_of_every_image_of_a_batch_smaller_than_the_classes_are_read(decoder):
    for batch in (2, 4):
        away, left = taken_apart(decoder, batch)
        assert away < 1e-3 and left < 1e-5


def test_features_of_as_many_images_as_classes_are_not(decoder):
    """B images in classes - 1 directions: their rows are no combinations of those any more."""
    away, _ = taken_apart(decoder, 12)
    assert away > 0.1


def test_of_one_image_they_are_read_from_a_frozen_stem_s_update(decoder, monkeypatch):
    model = small_vit(depth=1).eval()
    photos = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    read = decoder.reader(model, Normalization())
    with torch.no_grad():
        true = read(photos)
    monkeypatch.setattr(decoder, "SIDE", 16)
    seen = decoder.read_from_gradient(model, Normalization(), photos, torch.tensor([1, 2]))
    assert torch.allclose(seen, true, atol=1e-4)
