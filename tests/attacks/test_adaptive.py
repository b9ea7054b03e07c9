"""What an adversary knows of the defenses is in every dummy update: else the attack is a straw man.

Each test fails when its piece of knowledge is dropped: the true images would no longer explain the
update that was seen.
"""

from __future__ import annotations

import pytest
import torch

from vitguard.attacks.dlg import IDLG
from vitguard.attacks.gelu_span import GeluSpan
from vitguard.attacks.inverting import InvertingGradients
from vitguard.core import Guess, Normalization

LABELS = torch.tensor([3, 7])


@pytest.fixture(scope="module")
def model(small_vit):
    return small_vit(depth=1, num_heads=2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def relative_gap(view, pixels, labels, **known):
    """How far the update of the true images, simulated, is from the seen one."""
    made = view.simulate(Normalization().apply(pixels), labels, seeded(), **known)
    assert made.tensors.keys() == view.update.tensors.keys()
    seen = view.update.tensors
    gap = sum((made.tensors[k] - seen[k]).double().square().sum() for k in seen)
    whole = sum(t.double().square().sum() for t in seen.values())
    return float((gap / whole).sqrt().detach())


STACKS = {
    "each example clipped": ("privacy:clip=0.5,noise=0", {}),
    "only one example clipped": ("privacy:clip={between},noise=0", {}),
    "the whole update clipped": ("client-privacy:clip=0.5,noise=0", {}),
    "pruned": ("pruning:keep=0.2", {}),
    "clipped, then pruned": ("client-privacy:clip=0.5,noise=0+pruning:keep=0.2", {}),
    "pruned, then clipped": ("pruning:keep=0.2+client-privacy:clip=0.5,noise=0", {}),
    "each example clipped, fixed positions": (
        "positions:kind=frozen+privacy:clip=0.5,noise=0",
        {},
    ),
    "clipped in each local step": (
        "privacy:clip=0.5,noise=0",
        {"learning_rate": 0.5, "local_steps": 2},
    ),
    "a clipped difference": (
        "client-privacy:clip=0.05,noise=0",
        {"learning_rate": 0.5, "local_steps": 2},
    ),
    "withheld, the rest clipped": ("withheld+client-privacy:clip=0.5,noise=0", {}),
}


@pytest.fixture(scope="module")
def norms(model, photos, observe):
    """Norm of the gradient of each of two photos; versions of torch draw other weights."""
    updates = [observe(model, photos[i][None], LABELS[i : i + 1]).update for i in (0, 1)]
    return [float(torch.stack([t.norm() for t in u.tensors.values()]).norm()) for u in updates]


@pytest.mark.parametrize("row", STACKS)
def test_the_true_images_explain_the_update(row, model, photos, observe, norms):
    stack, how = STACKS[row]
    stack = stack.format(between=0.9 * min(norms) + 0.1 * max(norms))
    view = observe(model, photos[:2], LABELS, defenses=stack, **how)
    assert relative_gap(view, photos[:2], LABELS) < 2e-3
    view.simulate(Normalization().apply(photos[:2]), LABELS, None)  # from fresh entropy


def test_the_two_examples_of_the_table_can_be_told_apart_by_a_clip_between_them(norms):
    """Ignored, such a clip would show: 0.9 % of one of two gradients, where 0.2 % is asked."""
    assert max(norms) > 1.01 * min(norms)


@pytest.mark.parametrize(
    "stack", ["privacy:clip=0.5,noise=0", "client-privacy:clip=0.5,noise=0", "pruning:keep=0.2"]
)
@pytest.mark.parametrize("kind", [IDLG, InvertingGradients])
def test_the_true_images_are_where_an_attack_stays(stack, kind, model, photos, observe):
    view = observe(model, photos[:2], LABELS, defenses=stack)
    attack = kind(iterations=1, start=Guess(photos[:2], LABELS))
    guess = attack.run(view, seeded())
    assert guess.details["distance at the start"] < 1e-5
    assert guess.details["simulated"] == [stack.partition(":")[0]]


@pytest.mark.parametrize("name", ["privacy", "client-privacy"])
def test_noise_is_expected_to_be_zero(name, model, photos, observe):
    made = []
    for noise in (0, 1):
        view = observe(model, photos[:2], LABELS, defenses=f"{name}:clip=0.5,noise={noise}")
        made.append(view.simulate(Normalization().apply(photos[:2]), LABELS, seeded()).tensors)
    for key, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][key])


def test_entries_that_were_pruned_are_not_matched(model, photos, observe):
    view = observe(model, photos[:2], LABELS, defenses="pruning:keep=0.2")
    other = torch.rand(photos[:2].shape, generator=seeded())
    made = view.simulate(Normalization().apply(other), LABELS, seeded()).tensors
    for key, tensor in made.items():
        assert not tensor[view.update.tensors[key] == 0].any(), key


def test_which_entries_were_pruned_is_not_visible_under_noise(model, photos, observe):
    view = observe(
        model, photos[:2], LABELS, defenses="pruning:keep=0.2+client-privacy:clip=0.5,noise=0.1"
    )
    made = view.simulate(Normalization().apply(photos[:2]), LABELS, seeded()).tensors
    shares = [float((t != 0).double().mean()) for t in made.values() if t.numel() > 100]
    assert max(shares) < 0.21


def test_a_clipped_update_is_differentiable(model, photos, observe):
    view = observe(model, photos[:2], LABELS, defenses="privacy:clip=0.5,noise=0")
    images = torch.zeros(2, 3, 16, 16, requires_grad=True)
    made = view.simulate(images, LABELS, seeded()).tensors
    sum(t.square().sum() for t in made.values()).backward()
    # the norm of a clipped example is what it is: its gradient turns, it does not grow
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.any()


# shuffles


def run_once(view, start=None):
    return IDLG(iterations=1, start=start).run(view, seeded())


@pytest.mark.parametrize(
    ("stack", "count", "where"),
    [
        ("shuffle:ratio=0.5,mask=uniform", 1, "rows of zeros in the position gradient"),
        ("shuffle:ratio=0.5,mask=uniform,draw=batch", 2, "rows of zeros in the position gradient"),
        ("positions:kind=frozen+shuffle:ratio=0.3,mask=uniform", 1, "residual of span inversion"),
    ],
)
def test_a_mask_that_leaked_is_used(stack, count, where, small_vit, photos, observe):
    wide = small_vit(num_heads=2, embed_dim=128)
    pixels, labels = photos[:count], LABELS[:count]
    view = observe(wide, pixels, labels, defenses=stack)
    guess = run_once(view, Guess(pixels, labels))
    assert guess.details["shuffle mask"] == where
    assert guess.shuffled.shape == (count, 16)
    assert guess.details["distance at the start"] < 1e-6, "the true images do not explain it"
    assert relative_gap(view, pixels, labels, shuffled=guess.shuffled) < 2e-3
    assert relative_gap(view, pixels, labels) > 0.01, "drawing a mask would do as well"


@pytest.mark.slow
def test_a_mask_of_an_earlier_attack_is_used(small_vit, photo, observe):
    wide = small_vit(num_heads=2, embed_dim=128)
    view = observe(
        wide, photo, LABELS[:1], defenses="positions:kind=frozen+shuffle:ratio=0.3,mask=uniform"
    )
    earlier = GeluSpan(seconds=0.5).run(view, seeded())
    assert earlier.shuffled is not None and bool(earlier.shuffled.any())
    start = Guess(photo, LABELS[:1], shuffled=earlier.shuffled)
    guess = run_once(view, start)
    assert guess.details["shuffle mask"] == "from the start"
    assert torch.equal(guess.shuffled, earlier.shuffled)
    assert guess.details["distance at the start"] < 1e-6


@pytest.mark.slow
def test_masks_that_differ_by_image_are_drawn_anew_at_each_step(model, photos, observe):
    view = observe(model, photos[:2], LABELS, defenses="shuffle:ratio=0.5,mask=uniform")
    guess = run_once(view)
    assert guess.shuffled is None
    assert guess.details["shuffle mask"] == "drawn anew at each step: each image had its own"
    inputs = Normalization().apply(photos[:2])
    first, same, other = (
        view.simulate(inputs, LABELS, seeded(s)).tensors["pos_embed"] for s in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.slow
def test_noise_hides_the_rows_of_zeros(model, photo, observe):
    view = observe(
        model, photo, LABELS[:1], defenses="shuffle:ratio=0.5,mask=uniform+noise:scale=1"
    )
    assert run_once(view).details["shuffle mask"].startswith("drawn anew at each step")


def test_a_batch_wide_mask_is_one_mask_for_clipped_examples_too(model, photos, observe):
    stack = "shuffle:ratio=0.5,mask=uniform,draw=batch+privacy:clip=0.5,noise=0"
    view = observe(model, photos[:2], LABELS, defenses=stack)
    made = view.simulate(Normalization().apply(photos[:2]), LABELS, seeded()).tensors
    rows = made["pos_embed"][0, 1:]
    assert int((rows == 0).all(-1).sum()) == 8, "two masks would leave fewer rows of zeros"
    mask = (view.update.tensors["pos_embed"][0, 1:] == 0).all(-1).expand(2, -1)
    assert relative_gap(view, photos[:2], LABELS, shuffled=mask) < 2e-3
