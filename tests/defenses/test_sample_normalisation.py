"""Sample normalisation: every example weighs the same, so that none comes back out of a batch."""

import pytest
import torch

from tests.conftest import observe, small_vit
from vitguard.attacks.position import PositionInversion
from vitguard.errors import InputError, Unprotected
from vitguard.guard import protect
from vitguard.metrics import psnr
from vitguard.registry import parse_stack

SPEC = "sample-normalisation"
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 4, 4])


def norm(update):
    return float(torch.cat([t.flatten() for t in update.tensors.values()]).norm())


def single(i, spec):
    return protect(small_vit(), spec).update(IMAGES[i : i + 1], LABELS[i : i + 1]).tensors


@pytest.mark.parametrize("mode", ["normalise", "clip"])
def test_each_example_adds_a_gradient_of_one_size_whatever_the_others_are(mode):
    plain = [single(i, []) for i in range(3)]
    sizes = [float(torch.cat([t.flatten() for t in one.values()]).norm()) for one in plain]
    size = sorted(sizes)[1]  # some are larger, some smaller
    update = protect(small_vit(), f"{SPEC}:size={size},mode={mode}").update(IMAGES, LABELS)
    factors = [size / s if mode == "normalise" or s > size else 1.0 for s in sizes]
    for name, tensor in update.tensors.items():
        wanted = sum(f * one[name] for f, one in zip(factors, plain, strict=True)) / 3
        torch.testing.assert_close(tensor, wanted, rtol=2e-3, atol=2e-5 * size)


@pytest.mark.parametrize("value", [200.0, 30.0])
def test_a_batch_with_a_fitted_image_is_refused_since_the_wrong_label_would_outweigh_it(value):
    model = small_vit()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()[4] = value  # sure of class 4: right for two images, wrong for one
    with pytest.raises(Unprotected, match=r"2 of 3 .*images 1, 2 .*Leave these images out"):
        protect(model, SPEC).update(IMAGES, LABELS)


def test_a_gradient_that_is_not_finite_is_refused_and_clipped_to_nothing():
    model, images = small_vit(), IMAGES.clone()
    images[1] = float("nan")
    with pytest.raises(Unprotected, match=r"1 of 3 .*images 1 of"):
        protect(model, SPEC).update(images, LABELS)


def test_clip_takes_what_a_fitted_image_gives():
    model = small_vit()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()[4] = 200.0
    assert norm(protect(model, f"{SPEC}:mode=clip").update(IMAGES, LABELS)) <= 1 / 3 + 1e-4


def test_one_example_has_exactly_the_size():
    for i in range(3):
        update = protect(small_vit(), f"{SPEC}:size=0.5").update(
            IMAGES[i : i + 1], LABELS[i : i + 1]
        )
        assert norm(update) == pytest.approx(0.5, rel=1e-4)


def test_what_the_adversary_simulates_is_the_update(photos):
    view = observe(small_vit(), photos[:2], torch.tensor([3, 5]), defenses=SPEC)
    images = view.normalization.apply(photos[:2])
    made = view.simulate(images, torch.tensor([3, 5]), None).tensors
    for name, tensor in view.update.tensors.items():
        torch.testing.assert_close(made[name].detach(), tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_image_that_outweighs_its_batch_comes_back_without_it_and_not_with_it(cifar_vit, cifar):
    """A wrong label among sure right ones: its gradient is nearly all of the batch's."""
    from tests.conftest import CIFAR_NORMALIZATION

    pixels, labels = cifar
    with torch.no_grad():
        sure = cifar_vit(CIFAR_NORMALIZATION.apply(pixels)).softmax(-1)
    best = sure.gather(1, labels[:, None])[:, 0].argsort(descending=True)[:4]
    batch, named = pixels[best], labels[best].clone()
    named[0] = (named[0] + 1) % 10

    def found(defenses):
        view = observe(
            cifar_vit, batch, named, defenses=defenses, normalization=CIFAR_NORMALIZATION
        )
        guess = PositionInversion().run(view, torch.Generator().manual_seed(0))
        return max(float(psnr(guess.images, batch[i : i + 1])) for i in range(4))

    assert found("none") > 30
    assert found(SPEC) < 20


def test_it_acts_in_update_alone_and_says_what_takes_its_place():
    guard = protect(small_vit(), SPEC)
    with pytest.raises(Unprotected):
        guard.model.train()(IMAGES)
    for wrong in (f"{SPEC}:size=0", f"{SPEC}:size=inf", f"{SPEC}:mode=cut"):
        with pytest.raises(InputError):
            parse_stack(wrong)
