"""Maximum a posteriori form of `span`: tokens inside the row space of a damaged gradient.

A gradient M = Delta^T A + E over tokens A (rows of M span the tokens) says that a token is
orthogonal to every right singular vector that only shows E. Two steps (docs/methods.md 2.5c):

1. The singular vectors as they are seen, each weighted by how little signal it shows, with the
   natural-image prior; a second solve weights each token by how strongly Delta shows it.
2. Maximum likelihood of the containment itself: |M (I - P_A)|^2 with P_A the projector on the
   tokens of the current images (Gauss-Newton on the patches, Delta eliminated).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import ENDLESS, Budget, charge
from vitguard.attacks.equations.linear import conjugate_gradients
from vitguard.attacks.equations.mlp import Norm
from vitguard.attacks.equations.rows import Embedding, block_rows, patch_gradient, whitened
from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.core import View
from vitguard.vit import Anatomy

__all__ = ["Containment"]

Patches = Float[Tensor, "patches pixels"]
_LOOSE = 1e-2  # how far a token's deviation may lie from the expected one, relative, squared


@dataclass(frozen=True)
class _Rows:
    """The rows M of one gradient with what is known of their noise.

    Args:
        matrix: M, shape (rows, columns).
        values, vectors: All right singular vectors, strongest first, as columns.
        tokens: How many directions the tokens fill.
        noise: Variance of an entry of E, from the singular values beyond them.
    """

    matrix: Tensor
    values: Tensor
    vectors: Tensor
    tokens: int
    noise: float

    @staticmethod
    def of(matrix: Tensor, tokens: int) -> _Rows:
        rows = torch.linalg.qr(matrix, mode="r").R if len(matrix) > matrix.shape[1] else matrix
        charge(qr=matrix.numel() * min(matrix.shape), svd=rows.numel() * rows.shape[1])
        _, values, vectors = torch.linalg.svd(rows, full_matrices=True)
        values = torch.cat([values, values.new_zeros(len(vectors) - len(values))])
        rest = (len(matrix) - tokens) * (matrix.shape[1] - tokens)
        tail = float(values[tokens:].square().sum()) / rest if rest > 0 else 0.0
        least = 1e-30 * float(matrix.square().mean())
        return _Rows(matrix, values, vectors.T, tokens, max(tail, least))

    def trust(self, softness: float) -> Tensor:
        """Weight of each direction's equation: 1 where it shows no more than `softness` of signal.

        0 takes the noise level.
        """
        level = softness * float(self.values[0]) or (self.noise * len(self.matrix)) ** 0.5
        return 1 / (1 + (self.values / level).square())

    @property
    def error(self) -> float:
        """Variance of an equation of a typical token, relative to the token's squared size."""
        middle = self.values[: max(1, min(self.tokens, len(self.values)))].median()
        return self.noise / float(middle.square().clamp_min(1e-300))


class Containment:
    """The equations of one view; `starts` and then `refine` give estimates.

    Args:
        view, anatomy: What is attacked; the update summed over local steps.
        even: Whether rows count as they are (added noise) or each at unit size (rounding).
        budget: Once it is spent estimates are rough.

    Raises:
        NotApplicable: The first norm is no LayerNorm.
        Blocked: The gradient of query, key and value cannot be read.
    """

    def __init__(
        self, view: View, anatomy: Anatomy, *, even: bool, budget: Budget = ENDLESS
    ) -> None:
        self.budget = budget
        self.anatomy, self.prior = anatomy, NaturalImages.of(view, anatomy)
        self.embedding = Embedding.of(view, anatomy)
        self.norm = Norm.of(view, anatomy.blocks[0].norm1)
        rows = block_rows(view, anatomy.blocks[0])
        self.augmented = rows.augmented
        scale = (lambda matrix: matrix) if even else whitened
        batch, own = view.update.batch_size, len(self.embedding.prefix)
        self.inputs = _Rows.of(scale(rows.matrix), batch * anatomy.patches + own)
        self.pixels: _Rows | None = None
        patches = batch * anatomy.patches
        if patches < anatomy.patch_pixels and view.update.can_read(anatomy.patch_weight):
            self.pixels = _Rows.of(scale(patch_gradient(view, anatomy)), patches)
        offset = self.embedding.offset + self.prior.mean @ self.embedding.weight.T
        varied = self.embedding.weight.std(dim=0).square().sum()
        self.deviation = (offset.var(dim=1, unbiased=False) + varied).sqrt()

    def starts(self, softness: float, hold: float) -> Iterator[Patches]:
        """Yield the estimate of step 1 with tokens alike, and the one with tokens weighted."""
        ones = torch.ones_like(self.deviation)
        typical = self.inputs.error * self.anatomy.width * self.deviation.square().mean()
        patches = self._solve(softness, ones / (hold * typical), self.deviation)
        yield patches
        tokens, deviation = self._tokens(patches)
        error = _reliability(tokens, self.inputs)[len(self.embedding.prefix) :]
        yield self._solve(softness, 1 / (hold * error * deviation.square()), deviation)

    def refine(self, patches: Patches, hold: float, steps: int = 2) -> Iterator[Patches]:
        """Yield the estimates of Gauss-Newton steps from `patches`; none without an equation."""
        for _ in range(steps if self.inputs.tokens < self.anatomy.width else 0):
            patches = self._step(patches, hold)
            yield patches

    def _coordinates(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return C with v^T [LN(z); 1] s = C (x, s) - t and, for every token, t."""
        inner = vectors[: self.anatomy.width].T
        last = vectors[self.anatomy.width] if self.augmented else 0.0
        charge(products=4.0 * inner.numel() * self.embedding.weight.shape[1], calls=12)
        weighted = inner * self.norm.scale
        weighted = weighted - weighted.mean(1, keepdim=True)
        onto = torch.cat(
            [weighted @ self.embedding.weight, (inner @ self.norm.shift + last)[:, None]], 1
        )
        offset = self.embedding.offset + self.prior.mean @ self.embedding.weight.T
        return onto, -offset @ weighted.T

    def _tokens(self, patches: Patches) -> tuple[Tensor, Tensor]:
        """Return [LN(z); 1] of all tokens, and the standard deviations s of the patches' z."""
        embedded = patches @ self.embedding.weight.T + self.embedding.offset
        z = torch.cat([self.embedding.prefix, embedded])
        tokens = self.norm(z)
        if self.augmented:
            tokens = torch.cat([tokens, torch.ones_like(tokens[:, :1])], 1)
        return tokens, embedded.std(dim=1, unbiased=False)

    def _solve(self, softness: float, weight: Tensor, deviation: Tensor) -> Patches:
        """Minimise the weighted equations plus prior over x and s, s kept near `deviation`."""
        onto, target = self._coordinates(self.inputs.vectors)
        trust = self.inputs.trust(softness)
        charge(products=2.0 * onto.numel() * (onto.shape[1] + len(weight)))
        normal = (onto * trust[:, None]).T @ (onto * trust[:, None])
        right = weight[:, None] * ((target * trust.square()) @ onto)
        pull = 1 / (_LOOSE * deviation.square())
        terms = [(torch.diag(weight), normal)]
        if self.pixels is not None:
            trusted = self.pixels.vectors * self.pixels.trust(softness)
            noise = self.pixels.error * self.anatomy.patch_pixels
            share = weight.mean() * self.inputs.error * self.anatomy.width
            share = share * self.deviation.square().mean() / noise
            outside = torch.zeros_like(normal)
            outside[:-1, :-1] = trusted @ trusted.T
            terms.append((share * torch.eye(len(weight)).to(normal), outside))
            right[:, :-1] -= share * (self.prior.mean @ outside[:-1, :-1])
        right[:, -1] += pull * deviation
        return self.prior.mean + self._conjugate(terms, right, pull)[:, :-1]

    def _step(self, patches: Patches, hold: float) -> Patches:
        """One Gauss-Newton step on |M (I - P_A)|^2 / noise + prior."""
        tokens, deviation = self._tokens(patches)
        known = len(self.embedding.prefix)
        rest, delta = _residual(tokens, self.inputs)
        onto, _ = self._coordinates(rest)
        delta = delta[known:] / deviation[:, None]
        noise = hold * self.inputs.noise
        terms = [(delta @ delta.T / noise, onto.T @ onto)]
        charge(products=2.0 * rest.shape[1] * self.inputs.matrix.numel())
        charge(products=2.0 * onto.numel() * (onto.shape[1] + len(delta)))
        right = delta @ (self.inputs.matrix @ rest) @ onto / noise
        if self.pixels is not None:
            rest, delta = _residual(patches, self.pixels)
            noise = hold * self.pixels.noise
            outside = torch.zeros_like(terms[0][1])
            outside[:-1, :-1] = rest @ rest.T
            terms.append((delta @ delta.T / noise, outside))
            right[:, :-1] += delta @ (self.pixels.matrix @ rest) @ rest.T / noise
        right[:, :-1] -= self.prior.precision(patches - self.prior.mean)
        pull = 1 / (_LOOSE * deviation.square())
        return patches + self._conjugate(terms, right, pull)[:, :-1]

    def _conjugate(self, terms: list[tuple[Tensor, Tensor]], right: Tensor, pull: Tensor) -> Tensor:
        """Solve sum K y N + (prior x, pull s) = right, preconditioned by the first term."""
        tokens, normal = terms[0]
        even = (normal.diagonal() + 1e-6 * normal.diagonal().mean()).rsqrt()
        strength, side = torch.linalg.eigh(normal * even * even[:, None])
        size, basis = torch.linalg.eigh(tokens)
        count, pixels = right.shape
        across = 2.0 * count * pixels * (count + pixels)  # a product from both sides
        charge(qr=2 * (count**3 + pixels**3))
        floor = self.prior.stiffness * even[:-1].square().mean()
        spectrum = size.clamp_min(0)[:, None] * strength.clamp_min(0) + floor

        def operator(y: Tensor) -> Tensor:
            charge(products=across * len(terms), elements=0.3 * y.numel(), calls=4 + 3 * len(terms))
            out = sum((k @ y @ n for k, n in terms), torch.zeros_like(y))
            out[:, :-1] += self.prior.precision(y[:, :-1])
            out[:, -1] += pull * y[:, -1]
            return out

        def precondition(r: Tensor) -> Tensor:
            charge(products=2 * across, elements=0.3 * right.numel(), calls=8)
            return (basis @ ((basis.T @ (r * even) @ side) / spectrum) @ side.T) * even

        return conjugate_gradients(operator, right, precondition, budget=self.budget)


def _reliability(tokens: Tensor, rows: _Rows) -> Tensor:
    """Return the variance of each token's equations: noise |(Delta^T)^+|^2."""
    _, delta = _residual(tokens, rows)
    charge(svd=delta.numel() * min(delta.shape))
    inverse = torch.linalg.pinv(delta, rtol=1e-9)
    return (rows.noise * inverse.square().sum(0)).clamp_min(1e-300)


def _residual(tokens: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Return a basis of what is orthogonal to the tokens, and the Delta that fits M best."""
    width = tokens.shape[1]
    charge(svd=tokens.numel() * len(tokens), qr=width**2 * len(tokens))
    charge(products=2.0 * rows.matrix.numel() * len(tokens))
    full = torch.linalg.qr(tokens.T, mode="complete")
    rank = min(tokens.shape)
    delta = torch.linalg.pinv(tokens.T) @ rows.matrix.T
    return full.Q[:, rank:], delta
