"""Which tokens share an image, from what they attend to."""

from __future__ import annotations

import pytest
import torch

from vitguard.attacks._groups import group_tokens


def tokens(images: int, patches: int, spread: float, seed: int):
    """Attended values around one centre an image, positions, and the true image of each."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(images, 30, generator=generator, dtype=torch.float64)
    noise = torch.randn(images, patches, 30, generator=generator, dtype=torch.float64)
    attended = (centers[:, None] + spread * noise).flatten(0, 1)
    position = torch.arange(patches).repeat(images)
    owner = torch.arange(images).repeat_interleave(patches)
    some = torch.randperm(len(owner), generator=generator)[: int(0.6 * len(owner))]
    return attended[some], position[some], owner[some]


@pytest.mark.parametrize("images", [2, 3, 6])
def test_incomplete_images_are_told_apart(images):
    attended, position, owner = tokens(images, 49, 0.3, images)
    groups, centers = group_tokens(attended, position, images)
    assert len(centers) == images
    for group in range(images):
        assert len(set(owner[groups == group].tolist())) == 1


def test_tokens_of_one_position_are_of_different_images_however_alike():
    attended, position, _ = tokens(4, 20, 50.0, 0)
    groups, _ = group_tokens(attended, position, 4)
    for place in range(20):
        here = groups[position == place].tolist()
        assert len(set(here)) == len(here)


def test_no_group_is_opened_that_no_token_speaks_for():
    attended, position, owner = tokens(3, 30, 0.1, 1)
    seen = owner < 2
    groups, centers = group_tokens(attended[seen], position[seen], 3)
    assert len(centers) == 2 and set(groups.tolist()) == {0, 1}


def test_one_token_is_a_group():
    groups, centers = group_tokens(torch.ones(1, 5), torch.tensor([3]), 4)
    assert groups.tolist() == [0] and torch.equal(centers, torch.ones(1, 5))
