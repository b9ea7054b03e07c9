"""Span inversion: fixed positions do not hide an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitguard.attacks.base import Attack, Rung
from vitguard.attacks.equations.counts import chain_remains, span_remains
from vitguard.attacks.equations.mask import shuffled_count, shuffled_positions
from vitguard.attacks.equations.rows import guess_from_patches
from vitguard.attacks.labels import try_labels
from vitguard.attacks.span.smooth import smoothest
from vitguard.attacks.span.system import System, span_system
from vitguard.core import AffineSpace, Guess, View
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy

__all__ = ["SpanInversion"]

_GAP = 3.0  # between the last singular value that counts and the first that does not


@dataclass(frozen=True)
class SpanInversion(Attack):
    """Solve for each patch from the span of the first block's inputs; no position gradient.

    The rows of [dL/dW_qkv | dL/db_qkv] of the first block span [LN(z_t); 1] over the T tokens.
    With Q a basis of the orthogonal complement, C centring, R a basis of the patches' span (rows
    of the patch gradient), x_i = R c_i and s the standard deviation of z_i,

        Q^T [ gamma * C(W R c + b + e_i) + s beta ; s ] = 0

    is linear in (c, s), with one factorisation for all positions. Where query, key and value
    cannot be read, the same is done one layer later with h_i = z_i + W_o o_i + b_o, o_i in the row
    space of dL/dW_o and LN2(h_i) in that of dL/dW_fc1. Without the patch gradient R is the
    identity, if the equations suffice.

    Where the solution is not unique the smoothest image of the affine space (the one of sparsest
    curvature) is returned, together with the space; under a shuffle the residual tells which
    positions were shuffled.

    Several local SGD steps count as one gradient, which they are to first order: then neither the
    space nor the mask is known, and nothing is exact.

    Args:
        smooth_iterations: Conjugate-gradient iterations for the smoothest image, in each of its
            rounds.

    Raises:
        NotApplicable: No plain embedding or no pre-norm first block, or as many tokens as
            dimensions (T >= D), so that no equation is left.
        Blocked: What neither form can do without is not in the update.

    References:
        docs/methods.md 2.4.
    """

    name: ClassVar[str] = "span"
    family: ClassVar[str] = "closed-form"
    rung: ClassVar[Rung | None] = Rung(20, 20)
    smooth_iterations: int = 30

    def remains(self, plain: Released) -> tuple[Remaining, ...]:
        """Count the equations of the first block, and of the first norm that chains lead to."""
        return span_remains(plain), chain_remains(plain)

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return one image, exact where `details["nullity"]` is 0 and the residual is small."""
        anatomy = Anatomy.of(view.model)
        view = view.gradient(steps=True)
        exact = view.update.local_steps == 1
        unknown = view.unknown
        shuffled = None
        if unknown is None:
            system = span_system(view, anatomy)
            offset = system.embedding.offset
        else:
            system, shuffled = _fitted(view, anatomy)
            offset = system.embedding.offset.clone()
            offset[shuffled] = system.unknown_offset(view, anatomy, unknown)
        solution, residual = system.solve(offset)
        patches, null = system.patches(solution), system.patch_null
        space = None
        if null.shape[1]:
            space = AffineSpace(patches, null)
            patches = smoothest(
                space, anatomy, normalization=view.normalization, iterations=self.smooth_iterations
            )
        details: dict[str, Any] = {
            "from": system.source,
            "patch_gradient": system.reads_patch,
            "nullity": null.shape[1],
            "residual": float(residual.median()),
        }
        if not exact:
            details["steps"] = "as one gradient, to first order"
        return guess_from_patches(
            view,
            anatomy,
            patches,
            labels=try_labels(view, generator),
            shuffled=None if shuffled is None or not exact else shuffled[None],
            space=space if exact else None,
            details=details,
        )


def _fitted(view: View, anatomy: Anatomy) -> tuple[System, Tensor]:
    """Return the system under a shuffle, and which positions are shuffled.

    The settings say how many at most. A mask of rectangles, a warm-up or a probability leaves
    fewer, and each one fewer is one more equation. So the mask is read from the system in which
    nothing is shuffled: more directions than there are make no true position misfit. Then those
    that were found are counted. A position that was overlooked would make that last equation
    wrong: then no gap stands behind the larger rank, and what the settings say is taken.
    """
    at_most, exactly = shuffled_count(view, anatomy)
    system = span_system(view, anatomy)
    plain = system.with_shuffled(0)
    residual = plain.solve(plain.embedding.offset)[1]
    shuffled = shuffled_positions(residual, at_most, exactly=exactly)
    found = int(shuffled.sum())
    if found >= at_most or view.update.batch_size > 1:
        return system, shuffled
    fitted = system.with_shuffled(found)
    values, rank = fitted.values, fitted.rank
    if rank < len(values) and values[rank - 1] < _GAP * values[rank]:
        return system, shuffled
    return fitted, shuffled
