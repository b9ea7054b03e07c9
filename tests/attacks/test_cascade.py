"""Cascade: labels and per-sample gradients of a batch from the last block."""

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


def test_trained_models_two_to_sixteen_images(cifar_vit, cifar, observe):
    pixels, labels = cifar
    for batch in (2, 5, 16):
        view = observe(
            cifar_vit, pixels[:batch], labels[:batch], defenses=FROZEN,
            normalization=CIFAR,
        )  # fmt: skip
        guess = Cascade().run(view, generator())
        assert guess.labels.tolist() == labels[:batch].sort().values.tolist()


def test_average_pooling_is_refused(small_vit, observe, photos):
    model = small_vit(global_pool="avg", class_token=False)
    with pytest.raises(NotApplicable, match="class-token pooling"):
        Cascade().run(observe(model, photos[:2], defenses=FROZEN), generator())


def test_names_what_it_cannot_do_without(small_vit, observe, photos):
    view = observe(small_vit(), photos[:2], defenses=FROZEN, withhold=(r"blocks\.1\.mlp\.fc2",))
    with pytest.raises(Blocked, match=r"blocks\.1\.mlp\.fc2"):
        Cascade().run(view, generator())


def test_noise_gives_no_labels(small_vit, observe, photos):
    from dataclasses import replace

    view = observe(small_vit(), photos[:2], defenses=FROZEN)
    noise = {k: torch.randn_like(t) for k, t in view.update.tensors.items()}
    with pytest.raises(NotApplicable, match="0 of 2 samples"):
        Cascade(seconds=0.5).run(
            replace(view, update=replace(view.update, tensors=noise)), generator()
        )
