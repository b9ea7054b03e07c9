"""A loss that a defense adds from the images is part of each example's loss, before clipping."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.defenses.privacy.privacy_models import build
from vitguard.core import Batch
from vitguard.defenses.positions import FixedPositions
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.guard import protect

CLIP = 0.3
KEYS = torch.tensor([3, 4, 5])


def stack(weight):
    return [FixedPositions("sincos"), PatchShuffle(ratio=0.5, dal="tokens", dal_weight=weight)]


def protected(weight, **settings):
    """Return a guard with privacy, and one of the same weights without."""
    torch.manual_seed(0)
    model = build("vit")
    defense = DifferentialPrivacy(clip=CLIP, **settings)
    # seeded draws: an example's key gives the same shuffle in both
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    private = protect(copy.deepcopy(model), [*stack(weight), defense], generator=seeded[0])
    plain = protect(copy.deepcopy(model), stack(weight), generator=seeded[1])
    plain.model.load_state_dict(private.model.state_dict())  # the same auxiliary head
    return private, plain


def key(guard, keys):
    for piece in guard.model.vitguard.installed():
        piece.key_examples(keys)


def one_by_one(plain, images, labels, *, inside=True):
    """Clip each example's gradient of task and auxiliary loss together, and add up."""
    parameters = {k: p for k, p in plain.model.named_parameters() if p.requires_grad}
    total = {k: torch.zeros_like(p) for k, p in parameters.items()}
    for i in range(len(images)):
        key(plain, KEYS[i : i + 1])
        task = F.cross_entropy(plain.model(images[i : i + 1]), labels[i : i + 1])
        loss = task + plain.auxiliary_loss() * inside
        found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        norm = torch.stack([g.norm() for g in found]).norm()
        for k, g in zip(parameters, found, strict=True):
            total[k] += g * min(1.0, CLIP / float(norm))
    return total


def some():
    torch.manual_seed(3)
    return torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (3,))


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.5, 200.0])
def test_auxiliary_loss_from_tokens_is_clipped_with_its_example(weight):
    private, plain = protected(weight, noise=0.0)
    images, labels = some()
    key(private, KEYS)
    (defense,) = (d for d in private.defenses if d.name == "privacy")
    got = defense.clipped_sum(private.model, F.cross_entropy, Batch(images, labels))
    wanted = one_by_one(plain, images, labels)
    assert got.keys() == wanted.keys()
    assert (flat(got) - flat(wanted)).norm() <= 1e-6 * flat(wanted).norm()
    without = one_by_one(plain, images, labels, inside=False)
    assert (flat(got) - flat(without)).norm() > 0.01 * flat(wanted).norm()  # it is in there


def test_a_huge_auxiliary_loss_moves_the_sum_by_clip_and_no_more():
    private, _ = protected(1e4, noise=0.0)
    images, labels = some()
    (defense,) = (d for d in private.defenses if d.name == "privacy")
    sums = []
    for count in (3, 2):
        key(private, KEYS[:count])
        batch = Batch(images[:count], labels[:count])
        sums.append(flat(defense.clipped_sum(private.model, F.cross_entropy, batch)))
    assert (sums[0] - sums[1]).norm().item() == pytest.approx(CLIP, rel=1e-6)


@pytest.mark.slow
def test_a_step_of_the_training_loop_clips_the_auxiliary_loss_as_well():
    pytest.importorskip("opacus")
    private, plain = protected(200.0, noise=0.0, delta=1e-3)
    images, labels = some()
    optimizer = torch.optim.SGD(private.model.parameters(), lr=1.0)
    loader = DataLoader(TensorDataset(images, labels), batch_size=3)  # a rate of one: all join
    optimizer, poisson = private.prepare(optimizer, loader)
    before = {k: p.detach().clone() for k, p in private.model.named_parameters()}
    for drawn, classes in poisson:
        assert torch.equal(drawn, images)
        key(private, KEYS)
        loss = F.cross_entropy(private.model(drawn), classes) + private.auxiliary_loss()
        loss.backward()
        optimizer.step()
    moved = {k: 3 * (before[k] - p.detach()) for k, p in private.model.named_parameters()}
    wanted = one_by_one(plain, images, labels)
    assert (flat(moved) - flat(wanted)).norm() <= 1e-6 * flat(wanted).norm()
