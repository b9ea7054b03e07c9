"""A batch of which nothing is left, such as after a filter: torch takes it, so does a shuffle."""

import pytest
import torch

import vitguard as vg


@pytest.mark.parametrize(
    "stack",
    [
        "shuffle:ratio=0.5",
        "shuffle:ratio=0.5,mask=uniform",
        "shuffle:ratio=0.5,probability=0.5",
        "shuffle:ratio=0.5,derangement=true,draw=batch",
        "positions:kind=sincos+shuffle:ratio=0.5",
    ],
)
def test_an_empty_batch_passes(small_vit, stack):
    model = small_vit(img_size=32, patch_size=8, depth=1)
    guard = vg.protect(model, stack)
    scores = model(torch.rand(0, 3, 32, 32))
    (scores.sum() + guard.auxiliary_loss()).backward()
    assert scores.shape == (0, 10)
    guard.update(torch.rand(40, 3, 32, 32), torch.arange(40) % 10)  # none moved: 2 ** -40
    assert guard.truth()["shuffled"].any()
