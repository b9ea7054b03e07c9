"""What a shuffle does not hide, as its docstring and docs/shuffle.md say."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from vitguard import data
from vitguard.attacks.span import SpanInversion
from vitguard.core import Guess, Normalization
from vitguard.defenses.positions import FixedPositions
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.guard import Guard, protect
from vitguard.metrics import baseline, psnr
from vitguard.threats import CuriousServer
from vitguard.vit import Anatomy

CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
STACKS = {"frozen": [FixedPositions("frozen")], "learnable": []}


def attack(model, pixels, label, shuffle, *, normalization, positions="frozen", seed=0):
    secret = torch.Generator().manual_seed(seed)
    stack = [*STACKS[positions], shuffle]
    guard = protect(copy.deepcopy(model).train(), stack, generator=secret)
    like = next(model.parameters())
    update = guard.update(normalization.apply(pixels).to(like), label)
    view = CuriousServer().view(guard, update, normalization)
    return guard, SpanInversion().run(view, torch.Generator().manual_seed(0)), update


def outside_space(guard: Guard, guess: Guess, pixels, normalization) -> float:
    """Return the PSNR of the truth's distance from the affine space that the guess reports."""
    anatomy = Anatomy.of(guard.model)
    patches = anatomy.patchify(normalization.apply(pixels).double())[0]
    patches = patches[guard.truth()["source"][0]]
    assert guess.space is not None
    missed = patches - guess.space.origin
    missed = missed - (missed @ guess.space.basis) @ guess.space.basis.T
    spread = torch.tensor(normalization.std, dtype=torch.float64).repeat_interleave(
        anatomy.patch_pixels // 3
    )
    return float(-10 * (missed * spread).square().mean().clamp_min(1e-20).log10())


@pytest.mark.parametrize("mask", ["blockwise", "uniform"])
@pytest.mark.parametrize("positions", list(STACKS))
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7])
def test_the_span_residual_tells_the_mask_and_the_truth_lies_in_the_space(
    cifar, cifar_vit, ratio, positions, mask
):
    model = copy.deepcopy(cifar_vit).double()
    for i in range(2):
        pixels, label = cifar[0][i : i + 1], cifar[1][i : i + 1]
        guard, guess, _ = attack(
            model, pixels, label, PatchShuffle(ratio, mask=mask), normalization=CIFAR,
            positions=positions, seed=i,
        )  # fmt: skip
        assert guess.shuffled is not None
        assert torch.equal(guess.shuffled[0], guard.truth()["shuffled"][0])
        assert outside_space(guard, guess, pixels, CIFAR) > 60


def test_float32_gradients_tell_the_mask_too(cifar, cifar_vit):
    right = told = there = 0
    spaces = []
    model = copy.deepcopy(cifar_vit).float()
    for i in range(10):
        pixels, label = cifar[0][i : i + 1], cifar[1][i : i + 1]
        guard, guess, _ = attack(
            model, pixels, label, PatchShuffle(0.3), normalization=CIFAR, seed=i
        )
        mask = guard.truth()["shuffled"][0]
        right += int((guess.shuffled[0] & mask).sum())
        told, there = told + int(guess.shuffled.sum()), there + int(mask.sum())
        spaces.append(outside_space(guard, guess, pixels, CIFAR))
    assert right / told == 1.0 and right / there == 1.0
    assert min(spaces) > 60


def test_learnable_positions_tell_the_mask_by_rows_of_zeros(cifar, cifar_vit):
    pixels, label = cifar[0][:1], cifar[1][:1]
    guard, _, update = attack(
        cifar_vit, pixels, label, PatchShuffle(0.5), normalization=CIFAR,
        positions="learnable",
    )  # fmt: skip
    zero = update.read("pos_embed")[0, 1:].eq(0).all(1)
    assert torch.equal(zero, guard.truth()["shuffled"][0])


@pytest.mark.parametrize("settings", [{"warmup": 3}, {"schedule": "linear", "steps": 9}])
def test_a_shuffle_that_has_not_begun_leaves_the_image_exact(cifar, cifar_vit, settings):
    """The settings allow 44 shuffled patches, and their equations would be given away."""
    model = copy.deepcopy(cifar_vit).float()
    for i in range(2):
        pixels, label = cifar[0][i : i + 1], cifar[1][i : i + 1]
        guard, guess, _ = attack(
            model, pixels, label, PatchShuffle(0.7, **settings), normalization=CIFAR, seed=i
        )
        assert not guard.truth()["shuffled"].any() and not guess.shuffled.any()
        assert float(psnr(guess.images, pixels)) > 80 and guess.details["nullity"] == 0


def test_equal_patches_under_one_unknown_position_are_one_token_and_no_obstacle(cifar_vit, cifar):
    pixels, label = cifar[0][:1].clone(), cifar[1][:1]
    pixels[..., :16] = 1.0  # half of the image is white
    guard, guess, _ = attack(
        copy.deepcopy(cifar_vit).double(), pixels, label, PatchShuffle(0.3), normalization=CIFAR
    )
    assert torch.equal(guess.shuffled[0], guard.truth()["shuffled"][0])
    assert outside_space(guard, guess, pixels, CIFAR) > 60


def show_and_hide(pixels: torch.Tensor, seed: int, mask: str) -> tuple[float, float]:
    """Return how far the smoothest image lies above flat patches, at ratios of 5 and 70 %."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", depth=2)
    floor = float(baseline(pixels, (16, 16)).patch_psnr)
    above = []
    for ratio in (0.05, 0.7):
        _, guess, _ = attack(
            model, pixels, torch.tensor([seed]), PatchShuffle(ratio, mask=mask),
            normalization=Normalization(), seed=seed,
        )  # fmt: skip
        above.append(float(psnr(guess.images, pixels)) - floor)
    return above[0], above[1]


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["uniform", "blockwise"])
@pytest.mark.parametrize("photo", range(7))
def test_the_smoothest_image_shows_the_photo_at_5_percent_and_nothing_at_70(photo, mask):
    pixels = data.sample_images((224, 224), count=7).pixels[photo : photo + 1]
    shown, hidden = show_and_hide(pixels, photo, mask)
    assert shown > 8
    assert hidden < 2


@pytest.mark.slow
@pytest.mark.parametrize("photo", range(3, 100, 16))
def test_the_same_on_photos_that_nothing_was_tuned_on(data_folder, photo):
    path = sorted((data_folder / "photos").glob("*.jpg"))[photo]
    pixels = data.load_images([path], (224, 224)).pixels
    shown, hidden = show_and_hide(pixels, photo, "uniform")
    assert shown > 8
    assert hidden < 2
