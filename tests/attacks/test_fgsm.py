"""FGSM: bounds, targets, epsilon lists, transfer, query surrogates, triptychs."""

from __future__ import annotations

import threading

import pytest
import timm
import torch
from torch import nn

from vitguard.attacks.fgsm import FGSM, train_surrogate
from vitguard.core import Normalization, Update
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.errors import InputError
from vitguard.guard import protect

NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=4,
        **changes,
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


@pytest.mark.slow
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


@pytest.mark.parametrize("epsilons", [(0.1, 0.2), (0.2, 0.1)])
def test_triptychs_at_the_largest_epsilon_hold_classes_and_confidences(victim, epsilons):
    images, labels = colours(8)
    result = FGSM(epsilons, examples=3).evaluate(
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
        assert example.perturbation.abs().max() > 0.19


@pytest.mark.slow
def test_surrogates_trained_on_answers_transfer_and_untrained_ones_less(victim):
    """Of five, in the mean: what one alone does depends on its initial weights."""
    images, labels = colours(64)
    own, _ = colours(96, seed=5)
    queries: list[int] = []

    def answer(pixels):
        queries.append(len(pixels))
        return victim(NORMALIZATION.apply(pixels)).argmax(-1)

    def robust(surrogate):
        result = FGSM(0.15, surrogate=surrogate).evaluate(
            victim, images, labels, normalization=NORMALIZATION
        )
        assert result.details["threat"] == "transfer"
        return result.robust_accuracy[0.15]

    drops = []
    for seed in range(7, 12):
        surrogate = make_model(seed=seed)
        untrained = robust(surrogate)
        queries.clear()
        train_surrogate(
            answer, surrogate, own, normalization=NORMALIZATION, epochs=16, batch_size=16,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert sum(queries) == len(own)
        drops.append(untrained - robust(surrogate))
    assert sum(drops) / len(drops) > 0.2, drops


class Breaks(nn.Module):
    """A model whose forward fails where it is told to."""

    def __init__(self, model, when):
        super().__init__()
        self.model, self.when = model, when

    def forward(self, images):
        if torch.is_grad_enabled() == self.when:
            raise RuntimeError("out of memory")
        return self.model(images)


@pytest.mark.parametrize("broken", [None, True, False])
def test_the_model_is_left_as_it_was(broken):
    images, labels = colours(2)
    model = Breaks(make_model(), broken).train()
    model.model.patch_embed.eval()
    model.model.patch_embed.requires_grad_(False)
    model(images).sum().backward() if broken is None else None

    def state():
        facts = {n: (p.requires_grad, p.grad, p._version) for n, p in model.named_parameters()}
        return facts, [m.training for m in model.modules()]

    before = state()
    if broken is None:
        FGSM().evaluate(model, images, labels)
    else:
        with pytest.raises(RuntimeError, match="memory"):
            FGSM().evaluate(model, images, labels)
    assert state() == before


def test_a_guarded_model_still_seals_after_an_attack_on_its_input():
    images, labels = colours(2)
    model = make_model()
    guard = protect(model, [PatchShuffle(0.5)])
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters() if "vitguard" not in n}
    for mode in (model.train, model.eval):
        mode()
        FGSM().perturb(model, images, labels)
        FGSM().evaluate(model, images, labels)
    model.train()
    guard.seal(Update(tensors=zeros))
    # a gradient of the user's own in eval mode is still refused
    nn.functional.cross_entropy(model.eval()(images), labels).backward()
    with pytest.raises(RuntimeError, match="eval mode"):
        guard.seal(Update(tensors=zeros))


def test_gradient_and_accuracy_are_those_of_eval_mode():
    images, labels = colours(32)
    model = make_model(drop_rate=0.5, pos_drop_rate=0.9)
    want = FGSM(0.05).perturb(model.eval(), images, labels)
    scores = FGSM((0.05,)).evaluate(model, images, labels)
    assert torch.equal(FGSM(0.05).perturb(model.train(), images, labels), want)
    again = FGSM((0.05,)).evaluate(model, images, labels)
    assert model.training and again.clean_accuracy == scores.clean_accuracy
    assert again.robust_accuracy == scores.robust_accuracy
    assert [e.before for e in again.examples] == [e.before for e in scores.examples]


def test_the_callers_gradient_mode_does_not_matter(victim):
    images, labels = colours(2)
    want = FGSM(0.05).perturb(victim, images, labels)
    with torch.no_grad():
        assert torch.equal(FGSM(0.05).perturb(victim, images, labels), want)
    with torch.inference_mode():
        inside = FGSM(0.05).perturb(victim, images.clone(), labels.clone())
    assert torch.equal(inside, want)
    assert not FGSM(0.05).perturb(victim, images.clone().requires_grad_(), labels).requires_grad


def test_int32_labels_and_a_list_of_epsilons_are_taken(victim):
    images, labels = colours(3)
    want = FGSM(0.05).perturb(victim, images, labels)
    assert torch.equal(FGSM([0.05]).perturb(victim, images, labels.int()), want)
    assert FGSM([0.1, 0]) == FGSM((0.1, 0.0)) and hash(FGSM([0.1])) == hash(FGSM((0.1,)))
    result = FGSM([0.1], targeted=True).evaluate(victim, images, labels.int())
    assert list(result.robust_accuracy) == [0.1]


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (torch.tensor([0, 4]), "from 0 to 3, got 4"),
        (torch.tensor([-1, 0]), "from 0 to 3, got -1"),
        (torch.rand(2, 4), "2 labels"),
        (torch.rand(2), "class indices"),
        (torch.tensor([1]), "2 labels"),
    ],
)
def test_labels_that_are_no_classes_are_refused(victim, labels, named):
    images, _ = colours(2)
    for call in (FGSM().perturb, FGSM().evaluate, FGSM(targeted=True).evaluate):
        with pytest.raises(InputError, match=named):
            call(victim, images, labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pixels_must_have_the_dtype_of_the_model(victim, dtype):
    images, labels = colours(2)
    model = make_model().to(dtype)
    for call in (FGSM().perturb, FGSM().evaluate):
        with pytest.raises(InputError, match=r"on cpu, got torch\.float32"):
            call(model, images, labels)
    example = FGSM().evaluate(model, images.to(dtype), labels).examples[0]
    assert example.adversarial.dtype == torch.float32
    # the adversary's own model need not be of the attacked one's
    got = FGSM(0.05, surrogate=victim).perturb(model, images.to(dtype), labels)
    want = FGSM(0.05).perturb(victim, images.to(dtype).float(), labels)
    torch.testing.assert_close(got.float(), want, atol=0.004, rtol=0)
    with pytest.raises(InputError, match="on meta"):
        FGSM().perturb(victim, images.to("meta"), labels)


def test_pixels_of_other_channels_are_refused(victim):
    images, labels = colours(2)
    with pytest.raises(InputError, match="3 channels"):
        FGSM().perturb(victim, images[:, :1], labels, normalization=NORMALIZATION)


def test_no_step_is_taken_along_a_gradient_that_is_not_finite():
    images, labels = colours(2)
    model = make_model()
    with torch.no_grad():
        model.head.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="finite gradient"):
        FGSM().perturb(model, images, labels)


def test_a_black_box_that_cannot_be_copied_is_attacked_by_transfer(victim):
    class Remote(nn.Module):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

        def forward(self, images):
            with self.lock:
                return victim(images)

    images, labels = colours(2)
    result = FGSM(surrogate=victim).evaluate(Remote(), images, labels)
    assert result.robust_accuracy == FGSM().evaluate(victim, images, labels).robust_accuracy
    white = FGSM().perturb(Remote(), images, labels)  # without a defense no copy is needed
    assert torch.equal(white, FGSM().perturb(victim, images, labels))


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
        {"epsilon": []},
        {"epsilon": "0.1"},
        {"epsilon": None},
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
