"""Positions that coincide hide the order of patches, and not what they show."""

import pytest
import timm
import torch
from scipy.optimize import linear_sum_assignment

import vitguard as vg
from tests.conftest import CIFAR_NORMALIZATION, drawn, moved
from vitguard.attacks.equations.places import crowds
from vitguard.attacks.gelu_span import GeluSpan
from vitguard.attacks.gelu_span.seams import place_by_seams
from vitguard.plan import plan_report
from vitguard.vit import Anatomy

NONE = "positions:kind=none"


def content(model, guess, pixels):
    """Decibels of every true patch under the best matching with the guessed ones."""
    anatomy = Anatomy.of(model)
    made, true = (anatomy.patchify(i.double()).flatten(0, 1) for i in (guess.images, pixels))
    gap = torch.cdist(made, true, compute_mode="donot_use_mm_for_euclid_dist").square()
    rows, columns = linear_sum_assignment(gap.numpy())
    return -10 * (gap[rows, columns] / made.shape[1]).clamp_min(1e-20).log10()


@pytest.mark.slow  # untrained models below, by the same equations
def test_the_patches_of_a_trained_model_without_positions_are_found(cifar_vit, cifar, observe):
    pixels, labels = cifar[0][:1], cifar[1][:1]
    view = observe(cifar_vit, pixels, labels, defenses=NONE, normalization=CIFAR_NORMALIZATION)
    guess = GeluSpan().run(view, torch.Generator().manual_seed(0))
    found = content(view.model, guess, pixels)
    assert int((found > 50).sum()) >= 60, guess.details
    assert float(guess.details["verified"]) > 0.9 and guess.details["order"] == "by seams"


def cropped(cifar, index, count=1):
    return cifar[0][index : index + count, :, 8:24, 8:24], cifar[1][index : index + count]


def check(model, observe, pixels, labels, stack, least=50.0):
    view = observe(model, pixels, labels, defenses=stack)
    guess = GeluSpan().run(view, torch.Generator().manual_seed(0))
    assert bool(guess.verified.all()), guess.details
    assert float(content(view.model, guess, pixels).min()) > least
    return guess


def test_a_model_built_without_positions_gives_its_patches_away(cifar, small_vit, observe):
    pixels, labels = cropped(cifar, 11)
    check(small_vit(pos_embed="none"), observe, pixels, labels, "none")


def test_relative_positions_alone_are_no_positions(cifar, observe):
    torch.manual_seed(0)
    model = moved(
        timm.create_model(
            "vit_relpos_small_patch16_224", img_size=16, patch_size=4, embed_dim=96, depth=2,
            num_heads=4, num_classes=10,
        )
    )  # fmt: skip
    pixels, labels = cropped(cifar, 19)
    check(model, observe, pixels, labels, "none")


def test_frozen_positions_that_coincide_are_no_positions(cifar, small_vit, observe):
    model = small_vit()
    model.pos_embed.data[:, 1:] = model.pos_embed.data[:, 1:2].clone()
    pixels, labels = cropped(cifar, 13)
    check(model, observe, pixels, labels, "positions:kind=frozen")


def test_patches_under_pairs_of_equal_positions_are_found(cifar, small_vit, observe):
    model = small_vit()
    model.pos_embed.data[:, 2::2] = model.pos_embed.data[:, 1::2].clone()
    pixels, labels = cropped(cifar, 20)
    check(model, observe, pixels, labels, "positions:kind=frozen")


def test_a_shuffle_adds_nothing_where_there_are_no_positions(cifar, small_vit, observe):
    pixels, labels = cropped(cifar, 15)
    check(small_vit(), observe, pixels, labels, f"{NONE}+shuffle:ratio=0.4")


@pytest.mark.slow
def test_both_images_of_a_batch_without_positions_are_found(cifar, small_vit, observe):
    pixels, labels = cropped(cifar, 16, count=2)
    guess = check(drawn(small_vit()), observe, pixels, labels, NONE)
    assert guess.details["told_apart"] == 0  # which patch is whose is not proved


def test_a_patch_that_is_placed_counts_once(cifar, small_vit):
    """Fewer pieces than holes: a piece that moves from hole to hole leaves no copy behind."""
    anatomy = Anatomy.of(small_vit())
    for index in range(8):
        patches = anatomy.patchify(cropped(cifar, index)[0])[0].double()
        fixed = torch.zeros(16, dtype=torch.bool)
        loose = patches[torch.randperm(16, generator=torch.Generator().manual_seed(index))[:11]]
        placed, filled = place_by_seams(
            anatomy, torch.zeros_like(patches), fixed, loose, torch.Generator().manual_seed(0)
        )
        assert int(filled.sum()) == 11
        assert torch.cdist(placed[filled], loose).argmin(1).unique().numel() == 11


def test_equal_offsets_form_crowds_and_near_ones_do_not():
    offset = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double()
    offset[3], offset[5] = offset[1], offset[4] + 1e-3
    assert [c.tolist() for c in crowds(offset)] == [[1, 3]]


@pytest.mark.slow
def test_plan_and_audit_agree_about_no_positions(cifar, small_vit):
    model, (pixels, labels) = small_vit(), cropped(cifar, 18)
    report = vg.audit(
        model, (pixels, labels), defenses=NONE, attacks=["gelu-span", "span"],
        normalization=vg.Normalization(),
    )  # fmt: skip
    found = {f.attack: f for f in report.findings if f.defense == NONE}
    assert found["gelu-span"].verdict == "leaks", found["gelu-span"]
    assert found["span"].verdict == "not applicable"
    left = plan_report(model, "head", positions="none").remaining()
    assert "gelu-span" in left and "span" not in left
