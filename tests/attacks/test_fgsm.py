"""FGSM: bounds, targets, epsilon lists, transfer, query surrogates, triptychs."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vitguard.attacks.fgsm import FGSM, train_surrogate
from vitguard.core import Normalization
from vitguard.errors import InputError

NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def make_model(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=4,
    )


def colours(count, seed=0):
    """Images of 4 classes that a model can tell apart by their colour."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    centre = torch.tensor([[0.6, 0.4, 0.4], [0.4, 0.6, 0.4], [0.4, 0.4, 0.6], [0.5, 0.5, 0.5]])
    noise = 0.3 * (torch.rand(count, 3, 16, 16, generator=generator) - 0.5)
    return centre[labels][:, :, None, None] + noise, labels


@pytest.fixture(scope="module")
def victim():
    images, labels = colours(128, seed=1)
    truth = {image.numpy().tobytes(): label for image, label in zip(images, labels, strict=True)}

    def answer(pixels):
        return torch.stack([truth[p.numpy().tobytes()] for p in pixels])

    return train_surrogate(
        answer,
        make_model(),
        images,
        normalization=NORMALIZATION,
        epochs=8,
        batch_size=16,
        generator=torch.Generator().manual_seed(0),
    )


def test_the_step_is_written_out(victim):
    images, labels = colours(3)
    leaf = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(victim(NORMALIZATION.apply(leaf)), labels)
    slope = torch.autograd.grad(loss, leaf)[0].sign()
    got = FGSM(0.03).perturb(victim, images, labels, normalization=NORMALIZATION)
    torch.testing.assert_close(got, (images + 0.03 * slope).clamp(0, 1), rtol=0, atol=1e-7)
    aimed = FGSM(0.03, targeted=True).perturb(victim, images, labels, normalization=NORMALIZATION)
    torch.testing.assert_close(aimed, (images - 0.03 * slope).clamp(0, 1), rtol=0, atol=1e-7)


def test_epsilon_bounds_pixels_and_pixels_stay_valid(victim):
    images, labels = colours(8)
    images[0] = 1.0
    images[1] = 0.0
    got = FGSM(0.2).perturb(victim, images, labels, normalization=NORMALIZATION)
    assert got.min() >= 0 and got.max() <= 1
    assert (got - images).abs().max() <= 0.2 + 1e-6
    assert (got - images).abs().max() > 0.19


def test_accuracy_falls_with_epsilon_and_is_clean_at_zero(victim):
    images, labels = colours(64)
    result = FGSM((0.0, 0.05, 0.3)).evaluate(victim, images, labels, normalization=NORMALIZATION)
    assert result.clean_accuracy > 0.9
    assert result.robust_accuracy[0.0] == result.clean_accuracy
    assert result.robust_accuracy[0.3] < result.robust_accuracy[0.05] <= result.clean_accuracy
    assert list(result.robust_accuracy) == [0.0, 0.05, 0.3]


def test_targets_are_wrong_classes_and_are_reached(victim):
    images, labels = colours(64)
    result = FGSM(0.2, targeted=True).evaluate(
        victim,
        images,
        labels,
        normalization=NORMALIZATION,
        generator=torch.Generator().manual_seed(0),
    )
    assert result.target_hits[0.2] > 0.3
    assert all(e.label != label for e, label in zip(result.examples, labels, strict=False))
    plain = FGSM(0.2).evaluate(victim, images, labels, normalization=NORMALIZATION)
    assert plain.target_hits == {}


def test_triptychs_hold_classes_and_confidences(victim):
    images, labels = colours(8)
    result = FGSM((0.1, 0.2), examples=3).evaluate(
        victim, images, labels, normalization=NORMALIZATION
    )
    assert len(result.examples) == 3
    for image, example in zip(images, result.examples, strict=False):
        assert torch.equal(example.image, image)
        torch.testing.assert_close(example.image + example.perturbation, example.adversarial)
        scores = victim(NORMALIZATION.apply(example.adversarial[None])).softmax(-1)[0]
        assert example.after[0] == scores.argmax()
        assert example.after[1] == pytest.approx(scores.max().item(), abs=1e-5)
        assert example.epsilon == 0.2


def test_a_surrogate_trained_on_answers_transfers(victim):
    queries: list[int] = []

    def answer(pixels):
        queries.append(len(pixels))
        return victim(NORMALIZATION.apply(pixels)).argmax(-1)

    own, _ = colours(96, seed=5)
    surrogate = train_surrogate(
        answer,
        make_model(seed=7),
        own,
        normalization=NORMALIZATION,
        epochs=8,
        batch_size=16,
        generator=torch.Generator().manual_seed(0),
    )
    assert sum(queries) == len(own)
    images, labels = colours(64)
    box = FGSM(0.15, surrogate=surrogate).evaluate(
        victim, images, labels, normalization=NORMALIZATION
    )
    noise = FGSM(0.15, surrogate=make_model(seed=9)).evaluate(
        victim, images, labels, normalization=NORMALIZATION
    )
    assert box.details["threat"] == "transfer"
    assert box.robust_accuracy[0.15] < noise.robust_accuracy[0.15] - 0.2


def test_the_model_keeps_its_mode_and_its_gradients(victim):
    images, labels = colours(2)
    model = make_model().train()
    model.patch_embed.eval()
    FGSM().evaluate(model, images, labels)
    assert model.training and model.blocks.training and not model.patch_embed.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_normalised_input_is_refused(victim):
    images, labels = colours(2)
    with pytest.raises(InputError, match="normalization"):
        FGSM().perturb(victim, NORMALIZATION.apply(images), labels)


@pytest.mark.parametrize(
    "values",
    [
        {"epsilon": -0.1},
        {"epsilon": 8.0},
        {"epsilon": ()},
        {"epsilon": float("nan")},
        {"examples": -1},
    ],
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(InputError):
        FGSM(**values)


def test_several_epsilons_need_evaluate(victim):
    images, labels = colours(2)
    with pytest.raises(InputError, match="evaluate"):
        FGSM((0.1, 0.2)).perturb(victim, images, labels)
