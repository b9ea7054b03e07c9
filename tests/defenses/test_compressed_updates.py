"""Low rank, sign and few levels: what leaves is what they say, and what is simulated of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import small_vit
from vitguard.core import Update
from vitguard.defenses.base import Draws
from vitguard.defenses.low_rank import LowRankUpdate
from vitguard.defenses.quantised_update import QuantisedUpdate
from vitguard.defenses.sign_update import SignUpdate
from vitguard.errors import InputError
from vitguard.registry import parse_stack
from vitguard.vit import Anatomy

ANATOMY = Anatomy.of(small_vit())
SHAPES = [(6, 9), (1, 7, 9), (5, 3, 2, 2), (1, 1, 9), (8,)]


def sealed(defense, tensor):
    return defense.seal(Update({"a": tensor}), ANATOMY, Draws()).tensors["a"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_no_matrix_has_more_directions_than_the_rank_and_none_fits_better(shape, rank):
    tensor = torch.randn(shape)
    cut = sealed(LowRankUpdate(rank), tensor)
    assert cut.shape == tensor.shape and cut.dtype == tensor.dtype
    matrix = tensor[0] if shape[0] == 1 and len(shape) == 3 else tensor
    if matrix.dim() < 2 or min(matrix.flatten(1).shape) <= rank:
        assert torch.equal(cut, tensor)
        return
    values = torch.linalg.svdvals(matrix.flatten(1))
    assert torch.linalg.matrix_rank(cut.reshape(matrix.flatten(1).shape), rtol=1e-4) == rank
    torch.testing.assert_close((tensor - cut).norm(), values[rank:].norm())


def test_what_the_adversary_simulates_is_what_was_sent_and_has_a_derivative():
    truth = torch.randn(6, 9, dtype=torch.float64)
    for defense in (LowRankUpdate(2), SignUpdate()):
        seen = defense.seal(Update({"a": truth}), ANATOMY, Draws())
        dummy = truth.clone().requires_grad_()
        made = defense.mimic({"a": dummy}, seen)["a"]
        made.square().sum().backward()
        assert bool(dummy.grad.any())
        close = 1e-9 if isinstance(defense, LowRankUpdate) else 0.5
        made = made.detach()
        assert float((made - seen.tensors["a"]).norm() / seen.tensors["a"].norm()) < close


@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=30))
def test_a_sign_has_one_of_two_values_or_is_zero(values):
    tensor = torch.tensor(values)
    sent = sealed(SignUpdate(), tensor)
    assert len(set(sent.abs().tolist()) - {0.0}) <= 1
    assert torch.equal(sent.sign(), tensor.sign()) or not bool(tensor.abs().mean())


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_entry_is_one_of_the_levels(bits, stochastic):
    tensor = torch.randn(400, generator=torch.Generator().manual_seed(0))
    sent = sealed(QuantisedUpdate(bits, stochastic), tensor)
    step = tensor.abs().max() / (2 ** (bits - 1) - 1)
    levels = (sent / step).round()
    torch.testing.assert_close(sent, levels * step)
    assert len(levels.unique()) <= 2**bits - 1 and float(levels.abs().max()) <= 2 ** (bits - 1) - 1
    assert float((sent - tensor).abs().max()) <= float(step) * (1.0 if stochastic else 0.51)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("stochastic", [True, False])
def test_a_narrow_type_has_no_level_more_and_none_beyond_the_largest(dtype, stochastic):
    for seed in range(4):
        tensor = torch.randn(5000, generator=torch.Generator().manual_seed(seed)).to(dtype)
        sent = sealed(QuantisedUpdate(4, stochastic), tensor)
        assert sent.dtype == dtype and len(sent.unique()) <= 15
        assert float(sent.abs().max()) <= float(tensor.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_entries_too_small_for_a_step_leave_rounded(dtype):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    tensor = torch.arange(9, dtype=dtype) * tiny
    for bits in (2, 4, 16):
        sent = sealed(QuantisedUpdate(bits), tensor)
        assert len(sent.unique()) <= 2**bits - 1 and bool((sent <= tensor.max()).all())
        assert bits < 16 or dtype != torch.float64 or not bool(sent.any())  # the step is zero


@pytest.mark.parametrize(
    "defense", [LowRankUpdate(), QuantisedUpdate(), SignUpdate()], ids=lambda d: d.name
)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_refused_by_name(defense, bad):
    tensor = torch.randn(5, 6)
    tensor[2, 3] = bad
    with pytest.raises(InputError, match=r"finite entries in a, got inf or NaN"):
        sealed(defense, tensor)


@pytest.mark.slow
def test_rounding_at_random_is_right_on_average():
    tensor = torch.tensor([0.3, -0.6, 1.0])
    sent = torch.stack([sealed(QuantisedUpdate(2), tensor) for _ in range(3000)])
    assert float((sent.mean(0) - tensor).abs().max()) < 0.05


def test_tensors_without_a_size_and_counters_pass_as_they_are():
    for defense in (LowRankUpdate(), SignUpdate(), QuantisedUpdate()):
        for tensor in (torch.zeros(3, 4), torch.arange(6).reshape(2, 3), torch.empty(0, 4)):
            assert torch.equal(sealed(defense, tensor), tensor)
    for wrong in ("low-rank:rank=0", "quantised-update:bits=1", "quantised-update:bits=17"):
        with pytest.raises(InputError):
            parse_stack(wrong)


def test_noise_and_signs_after_a_cut_have_any_rank_and_say_so():
    from vitguard.defenses.base import traits_of

    assert traits_of(parse_stack("low-rank:rank=3"), ANATOMY).rank == 3
    for after in ("noise:scale=0.1", "sign-update", "quantised-update", "client-privacy:clip=1.0"):
        assert traits_of(parse_stack(f"low-rank:rank=3+{after}"), ANATOMY).rank == 0, after
