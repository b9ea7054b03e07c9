"""What several attacks share: probing a model, a norm's derivative, falling spectra."""

import pytest
import torch
from torch import nn

from vitguard.attacks.equations.mlp import Norm
from vitguard.attacks.equations.probe import probe
from vitguard.attacks.spectrum import filtered, frequencies
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def norm():
    return Norm(normal(6, seed=1), normal(6, seed=2), 1e-3)


def test_a_norm_pushes_and_pulls_as_automatic_differentiation_does(norm):
    h, moves, slopes = normal(3, 6), normal(3, 6, seed=3), normal(3, 6, seed=4)
    _, pushed = torch.func.jvp(norm, (h,), (moves,))
    made, pull = torch.func.vjp(norm, h)
    torch.testing.assert_close(norm.pushed(h, moves), pushed, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.pulled(h, slopes), pull(slopes)[0], rtol=0, atol=1e-12)
    flat, deviation = norm.plain(h)
    torch.testing.assert_close(norm.scale * flat + norm.shift, made, rtol=0, atol=1e-12)
    assert deviation.shape == (3, 1)


def test_many_moves_of_many_inputs_are_pushed_at_once(norm):
    h, moves = normal(3, 6), normal(5, 6, seed=3)
    together = norm.pushed(h[:, None], moves)
    for i in range(3):
        for j in range(5):
            assert torch.allclose(together[i, j], norm.pushed(h[i], moves[j]), atol=1e-14)


def test_probing_sees_what_the_model_passes_on_and_leaves_no_hook(small_vit, observe, photo):
    view = observe(small_vit(), photo)
    block = Anatomy.of(view.model).blocks[0]
    entered, left = probe(view, entering=[block.attention], leaving=[block.norm1])
    assert torch.equal(entered, left) and entered.shape == (1, 17, 96)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in view.model.modules())


def test_probing_a_module_that_is_not_called_does_not_apply(small_vit, observe, photo):
    view = observe(small_vit(), photo)
    view.model.add_module("aside", nn.Linear(2, 2))
    with pytest.raises(NotApplicable, match="aside"):
        probe(view, leaving=["aside"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in view.model.modules())


@pytest.mark.parametrize("size", [(6, 8), (7, 5)])
def test_one_wave_has_the_frequency_of_its_entry(size):
    height, width = size
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    wave = torch.cos(2 * torch.pi * (2 * down / height + across / width)).double()[None]
    gain = frequencies(wave)
    assert gain.min() == 1 / max(size) and gain[0, 0] == gain.min()
    expected = ((2 / height) ** 2 + (1 / width) ** 2) ** 0.5
    torch.testing.assert_close(filtered(wave, gain), wave * expected, rtol=0, atol=1e-6)
