"""Cascade: labels and per-sample gradients of a batch from the last block."""

from dataclasses import replace

import pytest
import torch

from vitguard.attacks.cascade import Cascade, last_block_samples
from vitguard.core import Normalization
from vitguard.errors import Blocked, NotApplicable

CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
FROZEN = "positions:kind=frozen"


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("labels", [[3, 7], [4, 4], [1, 5, 1], [0, 9, 2, 2]])
def test_labels_of_a_batch_repeats_included(small_vit, observe, photos, labels):
    batch = len(labels)
    view = observe(small_vit(), photos[:batch], torch.tensor(labels), defenses=FROZEN)
    guess = Cascade(seconds=8.0).run(view, generator())
    assert guess.labels.tolist() == sorted(labels)
    assert guess.details["residual"] < 1e-3


@pytest.mark.parametrize("changes", [{"init_values": 0.1}, {"qkv_bias": False}, {"reg_tokens": 2}])
def test_variants(small_vit, observe, photos, changes):
    view = observe(small_vit(**changes), photos[:2], torch.tensor([6, 2]), defenses=FROZEN)
    assert Cascade().run(view, generator()).labels.tolist() == [2, 6]


def test_samples_are_the_inputs_and_gradients_of_each_image(small_vit, observe, photos):
    model, labels, seen = small_vit(), torch.tensor([3, 7]), {}
    view = observe(model, photos[:2], labels, defenses=FROZEN)
    samples = last_block_samples(view, generator())
    last = model.blocks[-1].mlp

    def keep(_module, inputs, output):
        output.retain_grad()
        seen.update(inputs=inputs[0], output=output)

    hooks = [
        last.fc1.register_forward_hook(lambda _m, inputs, _o: seen.update(first=inputs[0])),
        last.fc2.register_forward_hook(keep),
    ]
    loss = torch.nn.functional.cross_entropy(model(Normalization().apply(photos[:2])), labels)
    loss.backward()
    for hook in hooks:
        hook.remove()
    true = seen["first"][:, 0].double().detach()
    order = torch.cdist(samples.inputs, true).argmin(1)
    assert sorted(order.tolist()) == [0, 1]
    torch.testing.assert_close(samples.inputs, true[order], rtol=1e-2, atol=1e-2)
    gradients = seen["output"].grad[:, 0].double()[order]
    torch.testing.assert_close(samples.gradients, gradients, rtol=1e-2, atol=2e-4)


@pytest.mark.slow
def test_trained_models_two_to_thirty_two_images(cifar_vit, cifar, observe):
    pixels, labels = cifar
    for batch in (2, 5, 16, 32):
        view = observe(
            cifar_vit, pixels[:batch], labels[:batch], defenses=FROZEN,
            normalization=CIFAR,
        )  # fmt: skip
        guess = Cascade(seconds=120.0).run(view, generator())
        assert guess.labels.tolist() == labels[:batch].sort().values.tolist()


def test_the_gradient_of_the_head_is_not_needed(small_vit, observe, photos):
    view = observe(small_vit(), photos[:3], torch.tensor([8, 1, 8]), withhold=("head",))
    assert Cascade().run(view, generator()).labels.tolist() == [1, 8, 8]


def test_every_image_has_its_weight_in_the_update(small_vit, observe, photos):
    view = observe(small_vit(), photos[:4], torch.tensor([3, 7, 7, 0])).gradient()
    weights = last_block_samples(view, generator()).weights
    torch.testing.assert_close(weights, torch.full((4,), 0.25).double(), rtol=1e-2, atol=0)


def test_labels_that_no_single_class_explains_are_refused(small_vit, observe, photos):
    def mixed(out, y):
        half = torch.nn.functional.one_hot(y, 10) + torch.nn.functional.one_hot(y + 1, 10)
        return torch.nn.functional.cross_entropy(out, half / 2)

    view = observe(small_vit(), photos[:3], torch.tensor([3, 7, 1]), loss=mixed)
    with pytest.raises(NotApplicable, match="soft label"):
        Cascade().run(view, generator())


@pytest.mark.slow
def test_images_of_unlike_weight_keep_their_labels(small_vit, observe, photos):
    """As after clipping each example: the head's gradient confirms the weights."""
    labels, weights = [3, 7, 1], (1 / 3, 0.2, 0.1)
    views = [observe(small_vit(), photos[k][None], torch.tensor([labels[k]])) for k in range(3)]
    tensors = {
        name: sum(w * v.update.tensors[name] for w, v in zip(weights, views, strict=True))
        for name in views[0].update.tensors
    }
    update = replace(views[0].update, tensors=tensors, batch_size=3)
    view = replace(views[0], update=update)
    assert Cascade().run(view, generator()).labels.tolist() == [1, 3, 7]
    found = last_block_samples(view, generator())
    order = found.labels.argsort()
    torch.testing.assert_close(
        found.weights[order], torch.tensor([0.1, 1 / 3, 0.2]).double(), rtol=0.02, atol=0
    )


def test_average_pooling_is_refused(small_vit, observe, photos):
    model = small_vit(global_pool="avg", class_token=False)
    with pytest.raises(NotApplicable, match="class-token pooling"):
        Cascade().run(observe(model, photos[:2], defenses=FROZEN), generator())


def test_names_what_it_cannot_do_without(small_vit, observe, photos):
    view = observe(small_vit(), photos[:2], defenses=FROZEN, withhold=(r"blocks\.1\.mlp\.fc2",))
    with pytest.raises(Blocked, match=r"blocks\.1\.mlp\.fc2"):
        Cascade().run(view, generator())


@pytest.mark.slow
def test_noise_gives_no_labels(small_vit, observe, photos):
    view = observe(small_vit(), photos[:2], defenses=FROZEN)
    noise = {k: torch.randn_like(t) for k, t in view.update.tensors.items()}
    with pytest.raises(NotApplicable, match="0 of 2 samples"):
        Cascade(seconds=0.5).run(
            replace(view, update=replace(view.update, tensors=noise)), generator()
        )
