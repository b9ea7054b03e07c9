"""Each distance and its derivative equal a slow obvious version."""

from __future__ import annotations

import math

import pytest
import torch

from vitguard.attacks.matching.distances import Cosine, LayerNorms, SquaredError, Weighted
from vitguard.errors import InputError


def _updates(seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 3, 2, 2)}

    def draw():
        return {k: torch.randn(s, generator=generator, dtype=dtype) for k, s in shapes.items()}

    return draw(), draw()


def _flat(tensors):
    return [v for name in sorted(tensors) for v in tensors[name].flatten()]


def _slow_squared(dummy, seen):
    return sum((a - b) ** 2 for a, b in zip(_flat(dummy), _flat(seen), strict=True))


def _slow_norms(dummy, seen):
    return sum(
        sum((x - y) ** 2 for x, y in zip(dummy[k].flatten(), seen[k].flatten(), strict=True)) ** 0.5
        for k in dummy
    )


def _slow_cosine(dummy, seen):
    a, b = _flat(dummy), _flat(seen)
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - dot / (sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5)


def _slow_april(dummy, seen):
    return _slow_squared(dummy, seen) + 0.7 * _slow_cosine({"b": dummy["b"]}, {"b": seen["b"]})


CASES = [
    (SquaredError(), _slow_squared),
    (LayerNorms(), _slow_norms),
    (Cosine(), _slow_cosine),
    (Weighted(((1.0, SquaredError(), None), (0.7, Cosine(), frozenset("b")))), _slow_april),
]


@pytest.mark.parametrize(("distance", "slow"), CASES, ids=lambda c: getattr(c, "__name__", None))
@pytest.mark.parametrize("seed", range(3))
def test_distance_equals_the_slow_version(distance, slow, seed):
    dummy, seen = _updates(seed)
    value, slopes = distance.measure(dummy, seen)
    leaves = {k: v.clone().requires_grad_() for k, v in dummy.items()}
    expected_value = slow(leaves, seen)
    expected_slopes = torch.autograd.grad(expected_value, list(leaves.values()))
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-12)
    for name, slope in zip(leaves, expected_slopes, strict=True):
        torch.testing.assert_close(slopes[name], slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", [c[0] for c in CASES])
def test_distance_is_zero_at_the_seen_update(distance):
    _, seen = _updates()
    value, slopes = distance.measure(seen, seen)
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert all(slope.abs().max() < 1e-7 for slope in slopes.values())


def test_cosine_does_not_see_clipping():
    dummy, seen = _updates()
    shorter = {k: 0.01 * v for k, v in seen.items()}
    torch.testing.assert_close(
        Cosine().measure(dummy, seen)[0], Cosine().measure(dummy, shorter)[0]
    )


def test_zero_updates_give_finite_numbers():
    dummy, seen = _updates(dtype=torch.float32)
    zero = {k: torch.zeros_like(v) for k, v in seen.items()}
    for distance in (Cosine(), LayerNorms(), SquaredError()):
        for pair in ((zero, seen), (dummy, zero), (zero, zero)):
            value, slopes = distance.measure(*pair)
            assert math.isfinite(value.item())
            assert all(slope.isfinite().all() for slope in slopes.values())


def test_an_empty_sum_is_refused():
    with pytest.raises(InputError, match="one weighted distance"):
        Weighted(())
