"""Each prior equals a slow obvious version."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vitguard.attacks.matching.priors import (
    FeatureStatistics,
    GroupConsistency,
    PatchBorders,
    PixelNorm,
    Scene,
    TotalVariation,
    register,
)
from vitguard.core import Normalization
from vitguard.errors import InputError
from vitguard.vit import Anatomy

SIZE, PATCH = 16, 4


@pytest.fixture(scope="module")
def anatomy():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=32,
        depth=1,
        num_heads=2,
        num_classes=3,
    )
    return Anatomy.of(model)


@pytest.fixture
def images():
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double()


def scene(anatomy, ensemble, index=0):
    return Scene(anatomy, Normalization(), ensemble, index)


def _pixels(images):
    batch, channels, height, width = images.shape
    for b in range(batch):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    yield b, c, i, j


def test_total_variation_mean(anatomy, images):
    down = [images[b, c, i, j] - images[b, c, i - 1, j] for b, c, i, j in _pixels(images) if i]
    across = [images[b, c, i, j] - images[b, c, i, j - 1] for b, c, i, j in _pixels(images) if j]
    slow = sum(map(abs, down)) / len(down) + sum(map(abs, across)) / len(across)
    got = TotalVariation()(images, scene(anatomy, images[None]))
    torch.testing.assert_close(got, slow)
    slow = sum(d * d for d in down) ** 0.5 + sum(d * d for d in across) ** 0.5
    got = TotalVariation("norm")(images, scene(anatomy, images[None]))
    torch.testing.assert_close(got, slow)


def test_pixel_norm(anatomy, images):
    slow = sum(images[at] ** 2 for at in _pixels(images)) ** 0.5
    torch.testing.assert_close(PixelNorm()(images, scene(anatomy, images[None])), slow)


def test_patch_borders(anatomy, images):
    slow = torch.zeros((), dtype=torch.float64)
    for k in range(PATCH, SIZE, PATCH):
        rows = [
            (images[b, c, k, j] - images[b, c, k - 1, j]) ** 2
            for b, c, i, j in _pixels(images)
            if i == 0
        ]
        columns = [
            (images[b, c, i, k] - images[b, c, i, k - 1]) ** 2
            for b, c, i, j in _pixels(images)
            if j == 0
        ]
        slow = slow + sum(rows) ** 0.5 + sum(columns) ** 0.5
    torch.testing.assert_close(PatchBorders()(images, scene(anatomy, images[None])), slow)


def test_patch_borders_ignore_jumps_inside_a_patch(anatomy):
    checker = torch.zeros(1, 3, SIZE, SIZE)
    checker[..., 1::PATCH, :] = 1.0
    checker[..., 2::PATCH, :] = 1.0
    assert PatchBorders()(checker, scene(anatomy, checker[None])) == 0


def _network():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    ).double()
    network[1].running_mean += 0.3
    return network


def test_feature_statistics(anatomy, images):
    network = _network()
    prior = FeatureStatistics(network, Normalization((0.4,) * 3, (0.2,) * 3))
    got = prior(images, scene(anatomy, images[None]))
    network.eval()
    features = ((images * 0.5 + 0.5) - 0.4) / 0.2
    slow = torch.zeros((), dtype=torch.float64)
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            mean = torch.stack([features[:, c].mean() for c in range(features.shape[1])])
            variance = torch.stack(
                [(features[:, c] - mean[c]).pow(2).mean() for c in range(features.shape[1])]
            )
            slow = slow + (mean - layer.running_mean).norm() + (variance - layer.running_var).norm()
        features = layer(features)
    torch.testing.assert_close(got, slow)


def test_feature_statistics_of_a_network_of_another_dtype(anatomy, images):
    wanted = FeatureStatistics(_network())(images, scene(anatomy, images[None]))
    seen = images.clone().requires_grad_()
    got = FeatureStatistics(_network().float())(seen, scene(anatomy, images[None]))
    (slope,) = torch.autograd.grad(got, seen)
    assert got.dtype == slope.dtype == images.dtype
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_feature_statistics_leave_the_network_as_it_was(anatomy, images):
    network = _network().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    FeatureStatistics(network)(images, scene(anatomy, images[None]))
    assert network.training and not network[1]._forward_hooks
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    with pytest.raises(InputError, match="BatchNorm2d"):
        FeatureStatistics(nn.Linear(2, 2))


def _slow_register(image, reference, reach):
    best, found = None, None
    height, width = image.shape[-2:]
    for down in range(-height // 2, height // 2):
        for across in range(-width // 2, width // 2):
            if abs(down) > reach * height or abs(across) > reach * width:
                continue
            moved = image.roll((down, across), (-2, -1))
            score = float((moved * reference).sum())
            if best is None or score > best:
                best, found = score, moved
    return found


def test_registration_equals_trying_every_shift(images):
    reference = images.flip(0).roll((2, -3), (-2, -1)) + 0.1 * images
    slow = torch.stack([_slow_register(x, r, 0.25) for x, r in zip(images, reference, strict=True)])
    assert torch.equal(register(images, reference, 0.25), slow)
    assert torch.equal(register(images.roll(3, -1), images, 0.25), images)


def test_group_consistency(anatomy, images):
    ensemble = torch.stack([images, images.roll(2, -1), images + 0.1])
    mean = ensemble.mean(0)
    aligned = [[_slow_register(x, m, 0.25) for x, m in zip(e, mean, strict=True)] for e in ensemble]
    target = torch.stack([torch.stack(a) for a in aligned]).mean(0)
    slow = ((images - target) ** 2).mean()
    torch.testing.assert_close(GroupConsistency()(images, scene(anatomy, ensemble)), slow)
    assert GroupConsistency()(images, scene(anatomy, images[None])) == 0


@pytest.mark.parametrize(
    "prior", [TotalVariation(), TotalVariation("norm"), PixelNorm(), PatchBorders()], ids=repr
)
def test_derivative_at_a_flat_image_is_finite(anatomy, prior):
    flat = torch.zeros(1, 3, SIZE, SIZE, requires_grad=True)
    (slope,) = torch.autograd.grad(prior(flat, scene(anatomy, flat[None])), flat)
    assert slope.isfinite().all()
