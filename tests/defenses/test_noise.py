"""Noise on the update: its size, its statistics, and no claim beyond that."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import small_vit
from vitguard.core import Update
from vitguard.defenses.base import Draws
from vitguard.defenses.noise import GradientNoise
from vitguard.vit import Anatomy

ANATOMY = Anatomy.of(small_vit())


def seal(defense, tensors, seed=0):
    draws = Draws(torch.Generator().manual_seed(seed))
    return defense.seal(Update(tensors), ANATOMY, draws).tensors


@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
def test_the_noise_is_relative_to_each_tensors_root_mean_square(scale):
    tensors = {"small": 1e-6 * torch.randn(200, 200), "large": 1e3 * torch.randn(40000)}
    sealed = seal(GradientNoise(scale), tensors)
    for name, tensor in tensors.items():
        noise = sealed[name] - tensor
        rms = tensor.square().mean().sqrt()
        assert float(noise.std() / rms) == pytest.approx(scale, rel=0.03)
        assert abs(float(noise.mean() / rms)) < 5 * scale / 200


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("kind", "size"), [(torch.float16, 1e-4), (torch.float32, 1e-30)])
def test_entries_whose_squares_are_too_small_for_the_type_get_their_noise(kind, size, keep):
    tensor = (size * torch.randn(40000, dtype=torch.float64)).to(kind)
    sealed = seal(GradientNoise(1.0, keep), {"a": tensor})["a"]
    assert sealed.dtype == kind
    noise, rms = (sealed.double() - tensor.double()), tensor.double().square().mean().sqrt()
    wanted = (2 - 2**0.5) ** 0.5 if keep else 1.0  # kept: (t + n) / sqrt(2) - t
    assert float(noise.std() / rms) == pytest.approx(wanted, rel=0.03)


@settings(max_examples=30, deadline=None)
@given(st.integers(10, 60), st.floats(0, 5), st.integers(0, 9))
def test_keeping_statistics_keeps_mean_and_norm(size, scale, seed):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()
    sealed = seal(GradientNoise(scale, keep_statistics=True), {"a": tensor}, seed + 100)["a"]
    assert float(sealed.mean()) == pytest.approx(float(tensor.mean()), abs=1e-9)
    assert float(sealed.norm()) == pytest.approx(float(tensor.norm()), rel=1e-9)
    if scale > 0.1:
        assert not torch.allclose(sealed, tensor, atol=1e-3)


def test_zero_scale_changes_nothing_and_zero_tensors_stay_zero():
    tensors = {
        "a": torch.randn(5),
        "zero": torch.zeros(3),
        "one": torch.ones(1),
        "none": torch.zeros(0),
    }
    for keep in (False, True):
        sealed = seal(GradientNoise(0.0, keep), tensors)
        assert all(torch.allclose(sealed[k], v, atol=1e-6) for k, v in tensors.items())
        noised = seal(GradientNoise(1.0, keep), tensors)
        assert not noised["zero"].any() and all(t.isfinite().all() for t in noised.values())


def test_the_generator_makes_the_noise_and_nothing_else_does():
    tensors = {"a": torch.ones(5)}
    assert torch.equal(
        seal(GradientNoise(1.0), tensors, 3)["a"], seal(GradientNoise(1.0), tensors, 3)["a"]
    )
    assert not torch.equal(
        seal(GradientNoise(1.0), tensors, 3)["a"], seal(GradientNoise(1.0), tensors, 4)["a"]
    )


def test_half_precision_stays_half_precision():
    sealed = seal(GradientNoise(0.1), {"a": torch.randn(9).bfloat16()})["a"]
    assert sealed.dtype == torch.bfloat16


def test_strong_noise_defeats_what_weak_noise_does_not(small_vit, observe, photo, generator):
    from vitguard.attacks.position import PositionInversion
    from vitguard.metrics import psnr

    quality = [
        float(
            psnr(
                PositionInversion()
                .run(observe(small_vit(), photo, defenses=f"noise:scale={scale}"), generator)
                .images,
                photo,
            )
        )
        for scale in (1e-6, 1.0)
    ]
    assert quality[0] > 60 and quality[1] < 20
