"""Position inversion: exact from learnable positions, and blocked without their gradient."""

import pytest
import timm
import torch

from vitguard import data
from vitguard.attacks.position import PositionInversion
from vitguard.core import Normalization
from vitguard.errors import Blocked, NotApplicable
from vitguard.metrics import psnr


def quality(view, pixels, generator):
    return psnr(PositionInversion().run(view, generator).images, pixels)


def test_one_gradient_gives_the_image_back_exactly(small_vit, observe, photo, generator):
    guess = PositionInversion().run(observe(small_vit().double(), photo.double()), generator)
    assert float(psnr(guess.images, photo)) > 150
    assert guess.images.min() >= 0 and guess.images.max() <= 1
    assert guess.details["rank"] == guess.details["patches"] == 16
    assert guess.labels.tolist() == [0]


def test_float32_loses_decibels_but_not_the_image(small_vit, observe, photo, generator):
    assert float(quality(observe(small_vit(), photo), photo, generator)) > 95


def as_file(photo):
    return (photo * 255).round() / 255


def test_an_image_file_comes_back_bit_for_bit(small_vit, observe, photo, generator):
    stored = as_file(photo)
    guess = PositionInversion().run(observe(small_vit(), stored), generator)
    assert (guess.images * 255).round().equal((stored * 255).round())
    assert float(psnr(guess.images, stored)) > 140 and "grid" in guess.details


def test_pixels_between_the_levels_of_a_file_are_not_rounded(small_vit, observe, photo, generator):
    """Half a level away everywhere; and one patch alone that is not of a file."""
    between = as_file(photo).clamp(0.1, 0.9) + 0.5 / 255
    alone = as_file(photo)
    alone[..., :4, :4] = between[..., :4, :4]
    for pixels in (between, alone):
        guess = PositionInversion().run(observe(small_vit(), pixels), generator)
        assert "grid" not in guess.details
        assert float(psnr(guess.images, pixels)) > 95


def test_a_mixture_is_not_rounded_though_it_lies_on_the_grid(
    small_vit, observe, photo, generator, monkeypatch
):
    """The hint alone does not do: the system has to hold with the rounded image."""
    monkeypatch.setattr("vitguard.attacks.position.ON_GRID", 1.0)
    pixels = as_file(photo).clamp(0.1, 0.9) + 0.5 / 255
    guess = PositionInversion().run(observe(small_vit(), pixels), generator)
    assert "grid" not in guess.details


@pytest.mark.parametrize(("rate", "at_least"), [(0.1, 70), (1e-3, 35)])
def test_the_difference_of_one_step_is_as_good_as_its_rounding(
    small_vit, observe, photo, generator, rate, at_least
):
    view = observe(small_vit(), photo, learning_rate=rate)
    assert view.update.kind == "difference"
    assert float(quality(view, photo, generator)) > at_least


def test_several_full_batch_sgd_steps_still_give_the_image_back(
    small_vit, observe, photo, generator
):
    view = observe(small_vit().double(), photo.double(), learning_rate=0.01, local_steps=5)
    guess = PositionInversion().run(view, generator)
    assert float(psnr(guess.images, photo)) > 120
    assert guess.labels is None  # five steps are no single cross-entropy gradient


def test_adam_steps_are_no_gradient(small_vit, observe, photo, generator):
    view = observe(small_vit(), photo, learning_rate=1e-4, optimizer="adamw")
    with pytest.raises(NotApplicable, match="adamw"):
        PositionInversion().run(view, generator)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({"defenses": "positions:kind=frozen"}, "pos_embed"),
        ({"defenses": "withheld"}, "pos_embed"),
        ({"withhold": ("position",)}, "pos_embed"),
        ({"withhold": ("patch",)}, "patch_embed.proj.weight"),
    ],
)
def test_a_hidden_gradient_blocks_by_its_name(small_vit, observe, photo, generator, how, name):
    with pytest.raises(Blocked) as caught:
        PositionInversion().run(observe(small_vit(), photo, **how), generator)
    assert caught.value.name == name


def test_a_batch_gives_a_mixture_and_not_an_image(small_vit, observe, photos, generator):
    guess = PositionInversion().run(observe(small_vit(), photos[:2]), generator)
    assert len(guess.images) == 1
    for photo in photos[:2]:
        assert float(psnr(guess.images, photo[None])) < 40


def test_more_patches_than_dimensions_is_not_unique(small_vit, observe, photo, generator):
    narrow = small_vit(embed_dim=12, num_heads=2).double()
    guess = PositionInversion().run(observe(narrow, photo.double()), generator)
    assert guess.details["rank"] == 11  # a norm's gradient has no mean: one direction less
    assert float(psnr(guess.images, photo)) < 40


def test_the_normalization_is_undone(small_vit, observe, photo, generator):
    normalization = Normalization((0.1, 0.5, 0.9), (0.2, 0.3, 0.4))
    view = observe(small_vit(), photo, normalization=normalization)
    assert float(quality(view, photo, generator)) > 95


@pytest.mark.slow
def test_trained_cifar_vit_median_over_40_images(cifar_vit, cifar, observe, generator):
    from tests.conftest import CIFAR_NORMALIZATION

    pixels, labels = cifar
    found, right = [], 0
    for image, label in zip(pixels[:, None], labels[:, None], strict=True):
        view = observe(cifar_vit, image, label, normalization=CIFAR_NORMALIZATION)
        guess = PositionInversion().run(view, generator)
        found.append(float(psnr(guess.images, image)))
        right += guess.labels.tolist() == label.tolist()
    assert torch.tensor(found).median() >= 120
    assert right == 40


@pytest.mark.slow
def test_every_one_of_twenty_photos_comes_back_at_95_decibels_from_a_vit_base(
    data_folder, observe, moved
):
    """Between the levels of image files float32 gives 91 dB at worst; files come back whole."""
    torch.manual_seed(0)
    model = moved(timm.create_model("vit_base_patch16_224", depth=2, num_classes=10))
    files = sorted((data_folder / "photos").glob("*.jpg"))[40:60]
    found = []
    for photo in data.load_images(files, (224, 224)).pixels.split(1):
        guess = PositionInversion().run(observe(model, photo), torch.Generator().manual_seed(0))
        found.append(float(psnr(guess.images, photo)))
    assert len(found) == 20 and min(found) >= 95, sorted(found)[:5]


def test_trained_cifar_vit_one_step_difference(cifar_vit, cifar, observe, generator):
    from tests.conftest import CIFAR_NORMALIZATION

    found = [
        quality(
            observe(cifar_vit, image, label, normalization=CIFAR_NORMALIZATION, learning_rate=0.1),
            image,
            generator,
        )
        for image, label in zip(*(x[:10, None] for x in cifar), strict=True)
    ]
    assert torch.cat(found).median() >= 55


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99])
def test_a_pruned_update_is_not_called_that_of_an_image_file(small_vit, observe, photo, keep):
    """Zeros where the update lacks values are on the grid as well, and are nobody's pixels."""
    page = (photo > 0.9).float()  # black and white
    model, zero_one = small_vit(), Normalization((0.0,) * 3, (1.0,) * 3)
    view = observe(model, page, defenses=f"pruning:keep={keep}", normalization=zero_one)
    guess = PositionInversion().run(view, torch.Generator().manual_seed(0))
    assert not (guess.images * 255).round().equal(page * 255)
    assert "grid" not in guess.details
