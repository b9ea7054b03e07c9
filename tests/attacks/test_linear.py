"""Linear solvers of the attacks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vitguard.attacks.equations.linear import conjugate_gradients, solve_positive


def systems(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count * size)
    wide = torch.randn(count, size, 2 * size, generator=generator, dtype=torch.float64)
    return wide @ wide.mT, torch.randn(count, size, generator=generator, dtype=torch.float64)


def test_solve_positive_solves() -> None:
    matrices, right = systems(5, 40)
    residual = (matrices @ solve_positive(matrices, right)[..., None])[..., 0] - right
    assert residual.norm() < 1e-12 * right.norm()


def test_a_matrix_that_is_not_positive_gives_no_step_and_spoils_no_other() -> None:
    matrices, right = systems(4, 10)
    alone = solve_positive(matrices, right)
    matrices[1] -= 100 * torch.eye(10)
    matrices[2, 3, 3] = torch.nan
    solved = solve_positive(matrices, right)
    assert not solved[1].any() and not solved[2].any()
    assert torch.equal(solved[0], alone[0]) and torch.equal(solved[3], alone[3])


@pytest.mark.slow
def test_wide_systems_return_on_several_threads() -> None:
    """Batched LU hangs there in some builds of torch."""
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from vitguard.attacks.equations.linear import solve_positive\n"
        "a = torch.randn(10, 150, 300); a = a @ a.mT\n"
        "x = solve_positive(a, torch.ones(10, 150))\n"
        "assert (a @ x[..., None] - 1).abs().max() < 1e-3\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=600
    )  # where it hangs, for ever


def test_conjugate_gradients_agree() -> None:
    matrices, right = systems(1, 30)
    found = conjugate_gradients(lambda x: matrices[0] @ x, right[0], tolerance=1e-12)
    exact = torch.linalg.solve(matrices[0], right[0])
    assert (found - exact).norm() < 1e-9 * exact.norm()
