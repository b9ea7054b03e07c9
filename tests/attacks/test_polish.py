"""Polish: nearly right images become exact, and nothing is rounded that does not explain more."""

from dataclasses import replace

import pytest
import torch

from tests.fast import fast_for
from vitguard.attacks.budget import ENDLESS, Budget
from vitguard.attacks.equations.linear import WholeUpdate, least_squares
from vitguard.attacks.evidence import mismatch
from vitguard.attacks.ladder import Ladder
from vitguard.attacks.ladder.block_equations import BlockEquations, Preconditioner
from vitguard.attacks.ladder.polish import polish
from vitguard.core import Guess
from vitguard.errors import InputError
from vitguard.metrics import psnr
from vitguard.vit import Anatomy

FROZEN = "positions:kind=frozen"
LABEL = torch.tensor([4])


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def view(small_vit, observe, photo):
    return observe(small_vit(), photo, LABEL, defenses=FROZEN)


@pytest.fixture(scope="module")
def hidden(small_vit, observe, photo):
    """Without the attention's gradient: the first block's equations cannot be written."""
    return observe(small_vit(), photo, LABEL, defenses=FROZEN, withhold=("attention",))


def near(view, photo, levels, patches=slice(None)):
    """A guess off by a normal error of `levels` grey levels in some patches."""
    anatomy = Anatomy.of(view.model)
    errors = torch.zeros(1, anatomy.patches, anatomy.patch_pixels, dtype=torch.float64)
    errors[:, patches] = torch.randn(errors[:, patches].shape, generator=seeded()).double()
    images = photo.double() + anatomy.unpatchify(errors) * levels / 255
    return Guess(images=images.clamp(0, 1), labels=LABEL)


# The polish itself.


@pytest.mark.slow
@pytest.mark.parametrize("known", fast_for(["view", "hidden"], fast=["hidden"]))
def test_an_image_on_the_grid_becomes_exact_where_most_patches_are_near_it(known, photo, request):
    view = request.getfixturevalue(known)
    guess = near(view, photo, 0.05)
    worse = near(view, photo, 0.45, patches=slice(3, 5)).images
    guess = replace(guess, images=torch.where((worse - photo).abs() > 1e-9, worse, guess.images))
    assert int(((guess.images - photo).abs() * 255 > 0.5).sum()) > 5
    made = polish(view, guess, seeded())
    assert "rounded" in made.details["polish"]
    assert float((made.images - photo.double()).abs().max()) < 1e-6


@pytest.mark.slow
def test_the_first_block_sharpens_an_image_off_the_grid_and_nothing_is_rounded(
    small_vit, observe, photos
):
    image = (photos[1:2] + 0.5 * photos[2:3]) / 1.7
    view = observe(small_vit(), image, LABEL, defenses=FROZEN)
    guess = near(view, image, 1.0)
    made = polish(view, guess, seeded())
    assert "rounded" not in made.details["polish"]
    assert "refined" in made.details["polish"]
    assert float(psnr(made.images, image)) > float(psnr(guess.images, image)) + 10
    assert mismatch(view, made) < 0.2 * mismatch(view, guess)


def test_a_rounded_image_that_the_update_contradicts_is_thrown_away(hidden, photo):
    wrong = photo.double().clone()
    wrong[0, :, 5, 5] += torch.where(wrong[0, :, 5, 5] < 0.5, 1, -1) / 255
    guess = Guess(images=wrong, labels=LABEL)
    made = polish(hidden, guess, seeded())
    assert "nothing gained" in made.details["polish"] and torch.equal(made.images, wrong)
    other = polish(hidden, replace(guess, labels=torch.tensor([5])), seeded())
    assert "not near" in other.details["polish"] and torch.equal(other.images, wrong)


@pytest.mark.slow
def test_without_levels_nothing_is_rounded(view, photo):
    made = polish(view, near(view, photo, 0.05), seeded(), levels=None)
    assert "rounded" not in made.details["polish"]
    with pytest.raises(InputError, match="levels"):
        polish(view, near(view, photo, 0.05), seeded(), levels=0)


def test_says_what_it_cannot_test(view, photo, photos, small_vit, observe):
    assert "not tried" in polish(view, Guess(images=photo), seeded()).details["polish"]
    two = observe(small_vit(), photos[:2], defenses=FROZEN)
    guess = Guess(images=photos[:2], labels=torch.tensor([0, 1]))
    assert "not tried" in polish(two, guess, seeded()).details["polish"]


def test_a_spent_budget_changes_nothing_and_is_said(view, photo):
    guess = near(view, photo, 0.4)
    made = polish(view, guess, seeded(), Budget.of(0))
    torch.testing.assert_close(made.images, guess.images)
    assert made.details["unfinished"] == ["polish"]


@pytest.mark.slow
def test_the_ladder_polishes_last_and_says_so(small_vit, observe, photo, view):
    made = Ladder().run(view, seeded())
    said = made.details["polish"]  # where the rungs ended on the grid themselves, nothing is left
    assert "rounded to the grid of image files" in said or "to its rounding" in said
    finest = 1e-6 if "grid" in said else 1e-5
    assert float((made.images - photo).abs().max()) < finest
    plain = Ladder(levels=None).run(view, seeded())
    assert "rounded" not in plain.details["polish"]
    noisy = observe(small_vit(), photo, LABEL, defenses=f"{FROZEN}+noise:scale=0.01")
    assert "polish" not in Ladder(seconds=5).run(noisy, seeded()).details
    with pytest.raises(InputError, match="levels"):
        Ladder(levels=0)


# Its parts, against slow obvious forms.


@pytest.fixture(scope="module")
def exact(small_vit, observe, photo):
    view = observe(small_vit().double(), photo.double(), LABEL, defenses=FROZEN)
    anatomy = Anatomy.of(view.model)
    equations = BlockEquations.of(view, anatomy)
    patches = anatomy.patchify(view.normalization.apply(photo.double()))[0]
    return view, equations, patches @ equations.basis


def test_the_equations_hold_at_the_truth_and_streams_are_the_model_s(exact, photo):
    view, equations, c = exact
    seen = {}
    block = view.model.blocks[0]
    hooks = [
        block.norm1.register_forward_pre_hook(lambda _m, args: seen.update(z=args[0])),
        block.norm2.register_forward_pre_hook(lambda _m, args: seen.update(h=args[0])),
    ]
    with torch.no_grad():
        view.model(view.normalization.apply(photo.double()))
    for hook in hooks:
        hook.remove()
    z, h = equations.streams(c)
    torch.testing.assert_close(z, seen["z"][0])
    torch.testing.assert_close(h, seen["h"][0])
    ones = (torch.ones(len(c)).double(),) * 2
    assert float(equations.misfits(c, ones).abs().max()) < 1e-6
    assert float(equations.misfits(c + 0.01, ones).abs().max()) > 1e-3


def test_misfits_of_the_truth_are_of_the_expected_size(view, photo):
    anatomy = Anatomy.of(view.model)
    equations = BlockEquations.of(view, anatomy)
    c = anatomy.patchify(view.normalization.apply(photo.double()))[0] @ equations.basis
    misfits = equations.misfits(c, equations.weights(c))
    assert 0.3 < float(misfits.square().mean().sqrt()) < 3


@pytest.mark.parametrize(
    "spread", [pytest.param(0, marks=pytest.mark.slow, id="alike"), pytest.param(2, id="uneven")]
)
def test_the_preconditioner_is_adjoint_and_narrows_the_spectrum(exact, spread):
    _, equations, c = exact
    weights = (torch.logspace(0, spread, len(c)).double(),) * 2
    root = Preconditioner.of(equations, c, weights)
    u, v = (torch.randn(c.shape, generator=seeded()).double() for _ in range(2))
    torch.testing.assert_close((root.up(u) * v).sum(), (u * root.down(v)).sum())
    jacobian = torch.func.jacrev(lambda c: equations.misfits(c, weights))(c)
    jacobian = jacobian.flatten(2).flatten(0, 1)
    basis = torch.eye(c.numel()).double().view(-1, *c.shape)
    ups = torch.stack([root.up(e).flatten() for e in basis], 1)
    before, after = (torch.linalg.svdvals(j) for j in (jacobian, jacobian @ ups))
    assert after[0] / after[-1] < 0.3 * before[0] / before[-1]


def test_least_squares_against_a_dense_solver():
    matrix = torch.randn(30, 8, generator=seeded()).double()
    right = torch.randn(30, generator=seeded()).double()
    how = {"iterations": 50, "enough": 1e-12}
    made = least_squares(lambda u: matrix @ u, lambda r: matrix.T @ r, right, **how)
    torch.testing.assert_close(made, torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0])


def test_the_whole_update_is_linearised_as_differences_say(exact, photo):
    view, _, _ = exact
    anatomy = Anatomy.of(view.model)
    patches = anatomy.patchify(view.normalization.apply(photo.double()))[0]
    free = torch.zeros(anatomy.patches, dtype=torch.bool)
    free[[2, 7]] = True
    update = WholeUpdate.at(view, patches, LABEL, free)
    v = torch.randn(2, anatomy.patch_pixels, generator=seeded()).double()
    moved = patches.clone()
    moved[free] += 1e-5 * v
    slow = (update.rest - WholeUpdate.at(view, moved, LABEL, free).rest) / 1e-5
    made = update.forth(v)
    assert float((made - slow).norm() / slow.norm()) < 1e-3
    u = torch.randn(made.shape, generator=seeded()).double()
    torch.testing.assert_close((made * u).sum(), (update.back(u) * v).sum())


@pytest.mark.slow
@pytest.mark.parametrize("sketched", [True, False])
def test_the_whole_update_gives_patches_back(exact, photo, monkeypatch, sketched):
    view, _, _ = exact
    anatomy = Anatomy.of(view.model)
    patches = anatomy.patchify(view.normalization.apply(photo.double()))[0]
    free = torch.zeros(anatomy.patches, dtype=torch.bool)
    free[[2, 7]] = True
    wrong = patches.clone()
    wrong[free] += 1e-3 * torch.randn(2, anatomy.patch_pixels, generator=seeded()).double()
    update = WholeUpdate.at(view, wrong, LABEL, free)
    if not sketched:
        monkeypatch.setattr(WholeUpdate, "_root", lambda *_: None)
    step = update.step(ENDLESS, seeded(), iterations=15)
    left = (wrong[free] + step - patches[free]).norm() / (wrong[free] - patches[free]).norm()
    assert float(left) < (0.02 if sketched else 0.95)
