"""Clients that inspect: fifty honest rounds pass, a crafted one is refused in one clear line."""

import copy

import pytest
import torch

import vitguard as vg
from tests.inspection.crafts import PUBLISHED
from vitguard.federated.local import LocalClient, LocalFederation

NAMES = ("ana", "bea", "cleo")


@pytest.fixture
def model(small_vit):
    return small_vit(img_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4)


@pytest.fixture
def clients():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3])
    images = (torch.rand(4, 3, 8, 8, generator=generator) + labels[:, None, None, None] / 4) / 2
    return {n: LocalClient(images[i::3], labels[i::3]) for i, n in enumerate(NAMES)}


def train(guard):
    """A client's own loop, as the sample clients have one."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    optimizer = torch.optim.AdamW(guard.model.parameters(), 3e-3)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(guard.model(images), torch.arange(4)).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("stack", "rounds"),
    [
        pytest.param("inspect", 50, marks=pytest.mark.slow),
        ("inspect", 3),
        ("inspect+positions:kind=sincos+shuffle+masking", 3),
    ],
)
def test_honest_training_is_never_refused_in_fifty_rounds(model, clients, stack, rounds):
    own = LocalClient(clients["bea"].images, clients["bea"].labels, train=train)
    federation = LocalFederation(
        model, clients | {"bea": own}, stack, training=vg.LocalTraining(0.1, 2, momentum=0.9)
    )
    for seen in federation.run(rounds):
        assert seen.refused == {} and not seen.failed
    assert all(g.state_dict()["inspection"]["rounds"] == rounds for g in federation.guards.values())


@pytest.mark.slow
@pytest.mark.parametrize("craft", PUBLISHED)
def test_a_round_with_crafted_weights_is_refused_in_one_line_and_nothing_leaves(
    model, clients, craft
):
    own = LocalClient(clients["bea"].images, clients["bea"].labels, train=train)
    federation = LocalFederation(model, clients | {"bea": own}, "inspect")
    assert federation.round().refused == {}
    honest = dict(federation.weights)
    crafted = copy.deepcopy(model)
    crafted.load_state_dict({**crafted.state_dict(), **honest})
    federation.weights = {n: t for n, t in PUBLISHED[craft](crafted).items() if n in honest}
    seen = federation.round()
    assert set(seen.refused) == set(NAMES) and seen.messages == ()
    for line in seen.refused.values():
        assert line.startswith("Expected weights without signs of a craft, got ")
        assert "\n" not in line
    federation.weights = honest
    assert federation.round().refused == {}
