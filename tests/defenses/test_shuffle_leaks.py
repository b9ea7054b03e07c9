"""What a shuffle does not hide, as its docstring and docs/shuffle.md say."""

from __future__ import annotations

import copy
from statistics import median

import pytest
import timm
import torch

import vitguard as vg
from tests.fast import crossed
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


@pytest.mark.parametrize(
    ("ratio", "positions", "mask"),
    crossed([0.7, 0.3, 0.1], STACKS, ["blockwise", "uniform"], rounds=2),
)
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "positions, attacks",
    [
        ("learnable", ("position", "span")),
        ("frozen", ("span",)),
    ],
)
@pytest.mark.slow
def test_the_audit_reports_precision_and_recall_of_the_mask(positions, attacks):
    """Zero rows of learnable positions tell it, and the residual of span whatever they are."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=192, depth=2, num_classes=10
    )
    pixels = data.sample_images((64, 64), count=2).pixels
    report = vg.audit(
        model, (pixels, torch.tensor([1, 2])), defenses=[*STACKS[positions], PatchShuffle(0.5)],
        attacks=list(attacks), batch_size=1,
    )  # fmt: skip
    defended = [finding for finding in report.findings if finding.defense != "none"]
    assert [finding.attack for finding in defended] == list(attacks)
    for finding in defended:
        assert finding.mask is not None
        assert (finding.mask.precision, finding.mask.recall) == (1.0, 1.0)


@pytest.mark.parametrize("settings", [{"warmup": 3}, {"schedule": "linear", "steps": 9}])
def test_a_shuffle_that_has_not_begun_leaves_the_image_exact(cifar, cifar_vit, settings):
    """The settings allow 44 shuffled patches, and their equations would be given away.

    The residuals of the last two images are rounding with gaps in it, as wide as a factor of two.
    """
    model = copy.deepcopy(cifar_vit).float()
    for i in (0, 9, 13):
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


@pytest.fixture(scope="module")
def vit_base():
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", depth=2)


def above_flat_patches(model, pixels: torch.Tensor, ratio: float, mask: str, seed: int) -> float:
    """Return by how many dB the smoothest image beats the best flat patches."""
    _, guess, _ = attack(
        model, pixels, torch.tensor([seed]), PatchShuffle(ratio, mask=mask),
        normalization=Normalization(), seed=seed,
    )  # fmt: skip
    return float(psnr(guess.images, pixels)) - float(baseline(pixels, (16, 16)).thumbnail)


@pytest.mark.slow
@pytest.mark.parametrize("photo", [0, 1])
def test_the_smoothest_image_shows_the_photo_at_5_percent_and_nothing_at_70(vit_base, photo):
    pixels = data.sample_images((224, 224), count=7).pixels[photo : photo + 1]
    assert above_flat_patches(vit_base, pixels, 0.05, "uniform", photo) > 8
    # where a rectangle of nine patches lies is luck: 6.6 to 14.9 dB on one photo
    draws = (photo, 10, 11)
    assert median(above_flat_patches(vit_base, pixels, 0.05, "blockwise", d) for d in draws) > 8
    assert above_flat_patches(vit_base, pixels, 0.7, "uniform", photo) < 2


@pytest.mark.slow
def test_the_same_on_photos_that_nothing_was_tuned_on(vit_base, data_folder):
    """Every eighth photo. Rectangles take neighbours together and hide a little more."""
    files = sorted((data_folder / "photos").glob("*.jpg"))[2::8]
    photos = [data.load_images([file], (224, 224)).pixels for file in files]
    shown = [above_flat_patches(vit_base, x, 0.05, "uniform", i) for i, x in enumerate(photos)]
    assert len(shown) == 13 and min(shown) > 8 and median(shown) > 12
    some = photos[::2]
    grouped = [above_flat_patches(vit_base, x, 0.05, "blockwise", i) for i, x in enumerate(some)]
    assert sum(x > 8 for x in grouped) >= 6 and median(grouped) > 11
    assert all(above_flat_patches(vit_base, x, 0.7, "blockwise", 1) < 2 for x in photos[::4])
