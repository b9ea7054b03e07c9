"""Keyed draws: masks and permutations as functions of each example's key."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitguard.defenses.shuffle.masks import (
    block_masks,
    permute_inside,
    uniform_masks,
)
from vitguard.draws import Draws

GRIDS = st.tuples(st.integers(1, 15), st.integers(1, 15))


DRAWS = Draws(torch.Generator().manual_seed(0))


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return Draws(torch.Generator().manual_seed(seed)).keys(count)


@given(GRIDS, st.integers(0, 225), st.integers(0, 2**62))
@settings(max_examples=40, deadline=None)
def test_uniform_masks_have_exactly_the_count(grid, count, seed):
    patches = grid[0] * grid[1]
    count = min(count, patches)
    mask = uniform_masks(DRAWS, keys(3, seed), patches, count)
    assert mask.sum(1).tolist() == [count] * 3


@given(GRIDS, st.floats(0, 1), st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_block_masks_never_exceed_the_count_and_are_never_empty_when_one_fits(grid, ratio, seed):
    count = math.floor(ratio * grid[0] * grid[1])
    inside = block_masks(DRAWS, keys(4, seed), grid, count).sum(1)
    assert (inside <= count).all()
    assert (inside > 0).all() or count == 0


def test_block_masks_come_close_to_the_ratio_and_hold_together():
    mask = block_masks(DRAWS, keys(200), (14, 14), 137).float()
    assert mask.sum(1).mean() > 0.9 * 137
    grid = block_masks(DRAWS, keys(200), (14, 14), 39).float().unflatten(1, (14, 14))
    borders = (grid.diff(dim=1).abs().sum() + grid.diff(dim=2).abs().sum()) / grid.sum()
    loose = uniform_masks(DRAWS, keys(200), 196, 39).float().unflatten(1, (14, 14))
    loose_borders = (loose.diff(dim=1).abs().sum() + loose.diff(dim=2).abs().sum()) / loose.sum()
    assert borders < 0.6 * loose_borders


def test_block_masks_favour_no_side_and_leave_no_patch_out():
    often = block_masks(DRAWS, keys(4000), (8, 8), 20).float().mean(0).unflatten(0, (8, 8))
    for mirrored in (often.flip(0), often.flip(1), often.T):
        assert (often - mirrored).abs().max() < 0.05
    # rectangles reach the corners least, as BEiT's do
    assert often.min() > 0.2 * often.mean()


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 2**62), st.booleans())
@settings(max_examples=60, deadline=None)
def test_permutation_inside_the_mask_and_identity_outside(patches, count, seed, derangement):
    drawn = keys(5, seed)
    mask = uniform_masks(DRAWS, drawn, patches, min(count, patches))
    mask[0] = False
    source = permute_inside(DRAWS, drawn, mask, derangement=derangement)
    slots = torch.arange(patches).expand(5, -1)
    assert torch.equal(source.sort(1).values, slots)
    assert torch.equal(source[~mask], slots[~mask])
    for row in range(5):
        inside = mask[row].nonzero().flatten()
        assert set(source[row][inside].tolist()) == set(inside.tolist())
        if derangement and len(inside) > 1:
            assert (source[row][inside] != inside).all()


def test_every_permutation_is_about_equally_likely():
    mask = torch.tensor([[True, False, True, True]]).expand(12000, -1)
    rows = permute_inside(DRAWS, keys(12000), mask).tolist()
    counts = {tuple(r): rows.count(r) for r in map(list, set(map(tuple, rows)))}
    assert len(counts) == 6
    assert all(abs(n - 2000) < 250 for n in counts.values())


def test_an_example_draws_the_same_alone_and_in_any_batch():
    drawn = keys(6)
    together = block_masks(DRAWS, drawn, (8, 8), 30)
    alone = torch.cat([block_masks(DRAWS, k[None], (8, 8), 30) for k in drawn.flip(0)]).flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(
        permute_inside(DRAWS, drawn, together)[2:3],
        permute_inside(DRAWS, drawn[2:3], together[2:3]),
    )


def uniform(drawn: torch.Tensor, stream: int) -> torch.Tensor:
    return torch.from_numpy(DRAWS.keyed(drawn, 500, stream=stream))


def test_numbers_are_uniform_and_independent():
    numbers = uniform(keys(200), 3)
    assert (numbers >= 0).all() and (numbers < 1).all()
    assert abs(float(numbers.mean()) - 0.5) < 0.005
    assert abs(float(numbers.var()) - 1 / 12) < 0.003
    # neighbouring keys, neighbouring numbers, neighbouring streams
    near = uniform(torch.arange(200), 3)
    for a, b in (
        (near[1:], near[:-1]),
        (near[:, 1:], near[:, :-1]),
        (near, uniform(torch.arange(200), 4)),
    ):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.02


def test_numbers_of_a_key_are_secret_without_the_key_of_their_source():
    """The same key under two sources: what one example's draw was tells nothing of another's."""
    drawn = keys(50)
    one, other = (torch.from_numpy(Draws().keyed(drawn, 500, stream=3)) for _ in range(2))
    assert not torch.equal(one, other)
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.03


@pytest.mark.parametrize("seed", [0, 1])
def test_same_generator_same_draw(seed):
    assert torch.equal(keys(4, seed), keys(4, seed))
    assert not torch.equal(keys(4, seed), keys(4, seed + 1))
