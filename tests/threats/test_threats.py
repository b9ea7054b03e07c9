"""What the adversary is granted: everything public, and no draw."""

import pytest
import torch

from vitguard.core import LocalTraining, Normalization
from vitguard.defenses.positions import FixedPositions, WithheldPositions
from vitguard.errors import Blocked, InputError
from vitguard.guard import protect
from vitguard.registry import parse_stack
from vitguard.threats import CuriousServer


def test_the_view_is_public_and_complete(small_vit, observe, photo):
    model = small_vit()
    view = observe(model, photo, defenses="positions:kind=random+noise:scale=0.5")
    assert view.image_shape == (3, 16, 16) and view.classes == 10
    assert view.settings == {
        "positions": {"kind": "random"},
        "noise": {"scale": 0.5, "keep_statistics": False},
    }
    assert not hasattr(view.model, "vitguard") and not view.model.training
    assert not view.model._forward_pre_hooks
    assert {n for n, _ in view.model.named_parameters()} == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("selector", "hidden", "visible"),
    [
        ("patch", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
        ("attention", "blocks.1.attn.proj.bias", "patch_embed.proj.weight"),
        ("embedding", "cls_token", "head.weight"),
        (r"blocks\.0\..*qkv", "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"),
        ("position", "pos_embed", "cls_token"),
    ],
)
def test_withheld_parameters_are_unreadable_and_say_by_what(
    small_vit, observe, photo, selector, hidden, visible
):
    view = observe(small_vit(), photo, withhold=(selector,))
    assert view.update.can_read(visible)
    with pytest.raises(Blocked, match="withheld by --withhold") as caught:
        view.read(hidden)
    assert caught.value.name == hidden
    generator = torch.Generator().manual_seed(0)
    made = view.simulate(photo, torch.tensor([0]), generator)
    assert not made.can_read(hidden) and made.can_read(visible)


@pytest.mark.parametrize("selector", ["no such name", "(", "token"])
def test_a_selector_that_names_nothing_is_refused(small_vit, observe, photo, selector):
    model = small_vit(class_token=False, global_pool="avg")
    with pytest.raises(InputError):
        observe(model, photo, withhold=(selector,))


STACKS = [
    "none",
    "withheld",
    *(f"positions:kind={kind}" for kind in ("sincos", "frozen", "random", "none")),
]


@pytest.mark.parametrize(
    "how", [{}, {"learning_rate": 0.1}, {"learning_rate": 0.1, "local_steps": 3}]
)
@pytest.mark.parametrize("stack", STACKS)
def test_simulating_the_true_images_gives_the_update_that_was_seen(
    small_vit, observe, photos, stack, how
):
    labels = torch.tensor([3, 5])
    model = small_vit().double()
    view = observe(model, photos[:2].double(), labels, defenses=stack, **how)
    images = Normalization().apply(photos[:2].double())
    made = view.simulate(images, labels, torch.Generator().manual_seed(5))
    assert set(made.tensors) == set(view.update.tensors)
    assert (made.kind, made.local_steps) == (view.update.kind, view.update.local_steps)
    for name, tensor in view.update.tensors.items():
        assert torch.allclose(made.read(name), tensor, atol=1e-9), name


@pytest.mark.parametrize("how", [{}, {"learning_rate": 0.1, "local_steps": 2}])
def test_a_simulated_update_is_differentiable_in_images_and_soft_labels(
    small_vit, observe, photo, how
):
    view = observe(small_vit(), photo, **how)
    images = Normalization().apply(photo).requires_grad_()
    labels = torch.full((1, 10), 0.1).requires_grad_()
    made = view.simulate(images, labels, torch.Generator().manual_seed(0))
    distance = sum((made.read(k) - v).square().sum() for k, v in view.update.tensors.items())
    slopes = torch.autograd.grad(distance, (images, labels))
    assert all(s.isfinite().all() and s.any() for s in slopes)


def test_a_simulated_update_carries_no_graph_that_nobody_asked_for(small_vit, observe, photo):
    view = observe(small_vit(), photo)
    images = Normalization().apply(photo)
    made = view.simulate(images, torch.tensor([0]))
    assert all(t.grad_fn is None for t in made.tensors.values())
    asked = view.simulate(images.requires_grad_(), torch.tensor([0]))
    for name, tensor in asked.tensors.items():
        assert tensor.grad_fn is not None
        torch.testing.assert_close(made.tensors[name], tensor.detach())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_steps_are_simulated_as_the_victim_takes_them(small_vit, photo, optimizer, steps):
    guard = protect(small_vit().double(), [])
    training = LocalTraining(1e-3, steps, optimizer, weight_decay=0.01)
    images = Normalization().apply(photo.double())
    update = guard.update(images, torch.tensor([0]), training=training)
    view = CuriousServer().view(guard, update, Normalization())
    made = view.simulate(images, torch.tensor([0]), torch.Generator().manual_seed(0)).tensors
    for name, seen in update.tensors.items():
        assert float((made[name] - seen).norm()) <= 1e-6 * float(seen.norm()), name


def test_withheld_positions_are_simulated_from_the_public_ones(small_vit, photo):
    model = small_vit()
    guard = protect(model, [WithheldPositions()])
    start = model.pos_embed.detach().clone()
    with torch.no_grad():
        model.pos_embed.add_(0.1)
    update = guard.update(photo, torch.tensor([0]))
    view = CuriousServer().view(guard, update, Normalization())
    assert torch.equal(view.weight("pos_embed"), start.double())


def test_the_model_of_the_view_is_a_copy(small_vit, photo):
    model = small_vit()
    guard = protect(model, [FixedPositions("frozen")])
    view = CuriousServer().view(guard, guard.update(photo, torch.tensor([0])), Normalization())
    with torch.no_grad():
        view.model.cls_token.add_(1)
    assert not torch.equal(view.model.cls_token, model.cls_token)


def test_simulation_leaves_the_seen_update_and_the_public_model_alone(small_vit, observe, photo):
    view = observe(small_vit(), photo, defenses="positions:kind=frozen", learning_rate=0.1)
    before = {k: v.clone() for k, v in view.model.state_dict().items()}
    view.simulate(photo, torch.tensor([1]), torch.Generator().manual_seed(0))
    assert all(torch.equal(before[k], v) for k, v in view.model.state_dict().items())
    assert not hasattr(view.model, "vitguard")


def test_knowing_a_defense_does_not_repeat_its_draw():
    stack = parse_stack("positions:kind=random")
    assert [d.known() for d in stack] == [FixedPositions("frozen")]
    assert parse_stack("noise")[0].known() == parse_stack("noise")[0]
