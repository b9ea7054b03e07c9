"""All tokens that entered an MLP: a search, of which each find makes the rest smaller.

l = V1 m and act(W1 l + b1) in span(V2) is a problem of T unknowns with one solution for each token.
A token that was found gives its own gradient g by a linear system: with a dual p of m among the
tokens and q of its activations, D1 p = (W2^T g) * act'(u) and D2 q = g, so (p, q) is the one null
vector of [D1 | -diag(act'(u)) W2^T D2], D1 and D2 the gradients of fc1 and fc2 in the bases V1 and
V2. Every other token is orthogonal to p, which takes this one out: the rest is a problem of one
unknown less, and no start ends at a token twice.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import Budget, charge
from vitguard.attacks.cascade.separate import LastBlock, descend

__all__ = ["find_tokens", "search_seconds"]

_STARTS = 16  # of a round: each that ends at another token counts, and the rest gets smaller
_PATIENCE = 4  # rounds without a new token
_SAME = 1e-2  # relative distance below which two tokens are one
_NEAR = 0.05  # residual in the smaller problem from which the whole one converges
_LOOSE = 30  # of `accept`, for tokens whose gradient stands out: rounding has more to say of them
_FINISH = 15  # steps in the whole problem
_APART = 0.1  # a null vector's singular value over the next one, below which it stands out


def search_seconds(tokens: int, hidden: int) -> float:
    """Return about how many nominal seconds all tokens take: ten a round, in ever fewer unknowns.

    Measured: 65 tokens of DINOv2-small 14, 197 of ViT-B/16 270 seconds of a core.
    """
    return tokens / 10 * _STARTS * 60 * 12.0 * hidden * tokens**2 / 4e10 / 3


def find_tokens(
    problem: LastBlock,
    pool: Float[Tensor, "some width"],
    budget: Budget,
    accept: float,
    generator: torch.Generator,
) -> Float[Tensor, "found tokens"]:
    """Return the coordinates of the tokens found, from starts at natural ones.

    Args:
        problem: Of T tokens.
        pool: Natural tokens to start from.
        accept: Relative residual below which a token counts as found; up to 30 times as much where
            its gradient stands out too, as rounding has it for tokens of small gradients.
    """
    count = problem.inner.shape[1]
    found, gradients = problem.inner.new_zeros(0, count), problem.inner.new_zeros(0, len(pool[0]))
    told = torch.zeros(0, dtype=torch.bool, device=found.device)
    every = torch.eye(count).to(problem.inner)
    left, idle = (problem, every), 0
    while len(found) < count and idle < _PATIENCE and not budget.over:
        # one that was told badly may have taken out another: then the whole is searched again
        rest, basis = (problem, every) if idle and idle % 2 == 0 else left
        pick = pool[torch.randperm(len(pool), generator=generator)[:_STARTS].to(pool.device)]
        start = pick @ rest.inner + rest.constant
        if idle % 2:  # few are left, and what natural ones have along these says little
            draw = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start)
            start = draw / draw.norm(dim=1, keepdim=True) * pick.norm(dim=1, keepdim=True)
        ends, residual = descend(rest, start, budget)
        near = _distinct(ends[residual.argsort()][: int((residual < _NEAR).sum())])
        # what was taken out is known to rounding only: finish in the whole
        ends, residual = descend(problem, near @ basis.T, budget, iterations=_FINISH)
        order = residual.argsort()[: int((residual < _LOOSE * accept).sum())]
        new = _distinct(ends[order], found)[: count - len(found)]
        own, apart = _own_gradients(problem, new)
        real = (problem.residual(new) < accept) | (apart < _APART)
        found, gradients = torch.cat([found, new[real]]), torch.cat([gradients, own[real]])
        told = torch.cat([told, apart[real] < _APART])
        idle = 0 if bool(real.any()) else idle + 1
        if bool(real.any()) and bool(told.any()) and len(found) < count:
            left = problem.without(found[told], gradients[told])
    return found


def _distinct(rows: Tensor, known: Tensor | None = None) -> Tensor:
    """Return the rows that are not near an earlier one, nor near a known one."""
    kept = rows[:0] if known is None else known
    before = len(kept)
    for row in rows:
        if not bool(((kept - row).norm(dim=1) < _SAME * row.norm()).any()):
            kept = torch.cat([kept, row[None]])
    return kept[before:]


def _own_gradients(problem: LastBlock, m: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's gradient behind fc2 up to its size, and how far it stands out.

    The second is the smallest singular value over the next one: small where there is one null
    vector, as there is where `m` is a token.
    """
    inner, outer = problem.inner_gradient, problem.outer_gradient
    across = problem.out.T @ outer
    first, second = inner.norm(), across.norm()
    hidden, count = inner.shape
    found, apart = [], []
    for slope in problem.activation.slope(problem.pre_activations(m)):
        charge(qr=hidden * (2.0 * count) ** 2, svd=(2.0 * count) ** 3, calls=20)
        system = torch.cat([inner / first, -slope[:, None] * across / second], 1)
        _, values, vectors = torch.linalg.svd(torch.linalg.qr(system, mode="r").R)
        found.append(outer @ (vectors[-1, count:] / second))
        apart.append(values[-1] / values[-2].clamp_min(1e-300))
    if not found:
        return outer.new_zeros(0, len(outer)), outer.new_zeros(0)
    return torch.stack(found), torch.stack(apart)
