"""Which tokens share an image, from what they attend to."""

from __future__ import annotations

import pytest
import torch

from vitguard.attacks.equations.attention import AttentionDraws
from vitguard.attacks.gelu_span.groups import group_tokens


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


def pure(groups: torch.Tensor, owner: torch.Tensor) -> bool:
    """Whether every group has tokens of one image only."""
    return all(len(set(owner[groups == g].tolist())) == 1 for g in set(groups.tolist()))


def share_right(groups: torch.Tensor, owner: torch.Tensor) -> float:
    """Share of the tokens of two images in the right one of two groups."""
    right = float((groups == owner).float().mean())
    return max(right, 1 - right)


@pytest.mark.parametrize("images", [2, 3, 6])
def test_incomplete_images_are_told_apart(images):
    attended, position, owner = tokens(images, 49, 0.3, images)
    groups = group_tokens(attended, position, images)
    assert sorted(set(groups.tolist())) == list(range(images))
    assert pure(groups, owner)


def test_tokens_of_one_position_are_of_different_images_however_alike():
    attended, position, _ = tokens(4, 20, 50.0, 0)
    groups = group_tokens(attended, position, 4)
    for place in range(20):
        here = groups[position == place].tolist()
        assert len(set(here)) == len(here)


def test_one_token_is_a_group():
    assert group_tokens(torch.ones(1, 5), torch.tensor([3]), 4).tolist() == [0]


def attending(seed: int):
    """Attended values of real attention over two images with nearly the same mean value."""
    generator = torch.Generator().manual_seed(seed)
    heads, patches, size = 2, 30, 8

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query, key, value = (draw(heads, 2 * patches, size) for _ in range(3))
    owner = torch.arange(2).repeat_interleave(patches)
    for image in (0, 1):  # a distance of the images far below the spread inside one
        value[:, owner == image] -= value[:, owner == image].mean(1, keepdim=True)
    value[:, owner == 1] += 0.05
    weights = (query @ key.mT / size**0.5).exp()
    own = weights * (owner[:, None] == owner)
    attended = ((own @ value) / own.sum(-1, keepdim=True)).transpose(0, 1).flatten(1)
    keep = torch.randperm(2 * patches, generator=generator)[:48]
    draws = AttentionDraws(weights[:, keep][:, :, keep], value[:, keep], patches)
    return attended[keep], (torch.arange(2 * patches) % patches)[keep], owner[keep], draws


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_what_queries_draw_tells_images_apart_that_means_do_not(seed):
    attended, position, owner, draws = attending(seed)
    assert share_right(group_tokens(attended, position, 2), owner) < 0.8
    assert share_right(group_tokens(attended, position, 2, draws), owner) > 0.95
