"""What is ruled out without a closer look is what a closer look would rule out."""

import pytest
import torch

from vitguard.inspection.recorder import _silent
from vitguard.inspection.shares import _differences, _one_sum_rules, _sketch, token_shares


def drawn(tokens, rows, seed=0):
    """Sizes of tokens, and a gradient of pairs of rows: alike, opposite, without a common token."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(tokens, generator=generator) + 0.5
    one = torch.randn(tokens, rows, generator=generator)
    two = one + 0.1 * torch.randn(tokens, rows, generator=generator)
    two[:, : rows // 4] *= -3
    apart = slice(rows // 4, rows // 2)
    one[tokens // 2 :, apart] = two[: tokens // 2, apart] = 0
    lone = torch.randint(tokens // 2, (rows,), generator=generator)
    # from no token that rules to one that is all there is
    one[lone, torch.arange(rows)] += tokens * torch.linspace(0, 1, rows)[torch.randperm(rows)]
    return sizes, torch.cat([one, two], dim=1)


@pytest.mark.parametrize("tokens", [20, 100, 1000])
def test_no_pair_that_one_token_rules_is_passed_over(tokens):
    rows = 64
    sizes, outputs = drawn(tokens, rows)
    pairs = torch.arange(2 * rows).view(2, rows)
    short = _sketch(outputs, sizes, torch.Generator().manual_seed(1)).T
    lengths = (sizes[:, None] * outputs).norm(dim=0)
    maybe = _one_sum_rules((short / lengths[:, None])[pairs], 1e-4)
    strongest, _ = _differences(outputs, sizes, sizes, pairs)
    ruled = strongest > 0.5
    assert ruled[rows // 4 : rows // 2].any() and not ruled.all()
    assert not (ruled & ~maybe).any()
    assert maybe.sum() < rows  # most are settled without


def test_rows_that_differ_by_rounding_are_no_pairs():
    generator = torch.Generator().manual_seed(0)
    inputs, row = (torch.randn(4, 25, n, generator=generator) for n in (7, 1))
    factors = torch.rand(6, generator=generator) + 0.5
    shares = token_shares(inputs, row * factors, 1, generator)
    assert len(shares.rows) == 6 and not len(shares.pairs)


def test_a_unit_that_one_token_of_many_sets_off_is_not_silent():
    tokens = torch.full((300, 3), -9.0)
    tokens[299, 0] = tokens[0, 1] = 1.0
    assert _silent(tokens, tokens[:256]) == 1
    assert _silent(tokens, tokens) == 1
