"""Where searches for tokens start: textures, what was found elsewhere, and what images attend to.

In a batch nearly all starts would end at the image that is easiest to find. Tokens found tell what
the tokens of each image attend to, and starts are pulled there (`_groups`, `Pull`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.attacks.gelu_span.found import Found
from vitguard.attacks.gelu_span.newton import Pull
from vitguard.attacks.gelu_span.remainder import Remainder
from vitguard.attacks.spectrum import filtered, frequencies
from vitguard.core import Normalization
from vitguard.vit import Anatomy

__all__ = ["Starts"]

_PULL = (-0.3, 0.8)  # decades of its strength
_AWAY = 0.6  # of the distance to what other images attend to, by which a pull may overshoot


@dataclass(frozen=True)
class Starts:
    """Draws coordinates in the family of what is left, given what was found.

    Args:
        found: So far.
        remainder: The family that the starts lie in.
        wanted: Tokens at each position, shape (positions,).
        missing: Those not found.
    """

    found: Found
    remainder: Remainder
    wanted: Int[Tensor, " positions"]
    missing: Int[Tensor, " positions"]
    anatomy: Anatomy
    normalization: Normalization
    generator: torch.Generator

    def free(self, each: int, *, first: bool) -> tuple[Tensor, Tensor, None]:
        """Return positions and coordinates of starts without a pull, `each` of every kind.

        Args:
            each: Starts of one kind at a position; more where many tokens share one.
            first: Start from the minimum-norm members too.
        """
        positions, starts = [], []
        for i in torch.nonzero(self.missing)[:, 0].tolist():
            crowd = int(self.wanted[i]) > 8
            count = 8 * min(int(self.wanted[i]), 16) if crowd else each
            here = self.found.position == i
            targets = [self._textures(count)]
            if crowd and bool(here.any()):
                targets.append(self._mixtures(here, count))
            elif bool(here.any()):
                targets.append(self._opposites(i, count))
            elif len(self.found):
                targets.append(self._elsewhere(i, count))
                targets.append(self._mixtures(torch.ones_like(here), count))
            v = self.remainder.project(i, torch.cat(targets))
            if first:
                v = torch.cat([v.new_zeros(1, v.shape[1]), v])
            positions.append(torch.full((len(v),), i, device=v.device))
            starts.append(v)
        return torch.cat(positions), torch.cat(starts), None

    def guided(self, groups: Int[Tensor, " tokens"]) -> tuple[Tensor, Tensor, Pull]:
        """Return starts pulled to what each image without a token at a position attends to.

        An image of which no token is known lies beyond the mean member, as seen from known ones.

        Args:
            groups: The image of every token found.
        """
        found, family = self.found, self.remainder.family
        zero = family.origin.new_zeros(1, self.remainder.free)
        centers = torch.stack(
            [found.attended[groups == g].mean(0) for g in range(int(groups.max()) + 1)]
        )
        positions, starts, targets = [], [], []
        for i in torch.nonzero(self.missing)[:, 0].tolist():
            here = found.position == i
            mean = self.remainder.expected(i)
            known = centers[groups[here]].mean(0) if bool(here.any()) else centers.mean(0)
            draw = 0.5 + 1.5 * torch.rand((), generator=self.generator).to(mean)
            targets.append(mean + draw * (mean - known))
            starts.append(zero)
            positions.append(i)
            for group in sorted(set(range(len(centers))) - set(groups[here].tolist())):
                near = self._nearest(i, groups == group)
                starts += [zero, self.remainder.project(i, near)]
                targets += [self._caricature(centers, group) for _ in range(2)]
                positions += [i, i]
        where = torch.tensor(positions, dtype=torch.long, device=self.missing.device)
        low, high = _PULL
        strength = torch.rand(len(positions), generator=self.generator).to(family.origin)
        target = torch.cat(targets) @ self.remainder.solver.attended
        return where, torch.cat(starts), Pull(target, 10 ** (low + (high - low) * strength))

    def _caricature(self, centers: Tensor, group: int) -> Float[Tensor, "one attended"]:
        """What an image attends to, its difference from the image most alike overdrawn."""
        own = centers[group : group + 1]
        if len(centers) == 1:
            return own
        gaps = own - torch.cat([centers[:group], centers[group + 1 :]])
        draw = _AWAY * torch.rand((), generator=self.generator).to(own)
        return own + draw * gaps[gaps.norm(dim=1).argmin()]

    def _nearest(self, position: int, mask: Tensor) -> Float[Tensor, "one pixels"]:
        """The patch found nearest to a position among the tokens of a mask."""
        distance = self._distance(position, self.found.position[mask])
        return self.found.patch[mask][distance.argmin()][None]

    def _distance(self, position: int, where: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Steps along rows and columns of the grid."""
        columns = self.anatomy.grid[1]
        rows = (where // columns - position // columns).abs()
        return rows + (where % columns - position % columns).abs()

    def _normal(self, *shape: int) -> Tensor:
        draw = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return draw.to(self.found.patch)

    def _textures(self, count: int) -> Tensor:
        """Patches with the spectrum of photos: random level, noise falling as 1 / frequency^2."""
        channels, (height, width) = self.anatomy.channels, self.anatomy.patch_size
        grey = self._normal(count, 1, height, width) + 0.3 * self._normal(
            count, channels, height, width
        )
        noise = filtered(grey, 1 / frequencies(grey).square())
        noise = noise / noise.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-9)
        strength = 0.15 * self._normal(count, 1, 1, 1)
        level = 0.5 + 0.3 * self._normal(count, 1, 1, 1) + 0.1 * self._normal(count, channels, 1, 1)
        return self.normalization.apply((level + strength * noise).clamp(0, 1)).flatten(1)

    def _any(self, count: int) -> Tensor:
        patch = self.found.patch
        return patch[torch.randint(len(patch), (count,), generator=self.generator).to(patch.device)]

    def _elsewhere(self, position: int, count: int) -> Tensor:
        """Patches found at other positions, near ones first."""
        distance = self._distance(position, self.found.position)
        jitter = torch.rand(len(distance), generator=self.generator).to(self.found.patch)
        return self.found.patch[(distance + 2 * jitter).argsort()[:count]]

    def _opposites(self, position: int, count: int) -> Tensor:
        """Beyond the minimum-norm member as seen from what was found here.

        That member lies among the true ones, so the others are on its far side.
        """
        here = self.found.patch[self.found.position == position].mean(0)
        base = self.remainder.base(position)
        some = torch.rand(count, 1, generator=self.generator).to(base) + 0.5
        return base + some * (base - here) + 0.5 * (self._any(count) - self._any(count))

    def _mixtures(self, rows: Tensor, count: int) -> Tensor:
        """Draws from the mean and covariance of some of the found patches."""
        here = self.found.patch[rows]
        spread = self._normal(count, len(here)) @ (here - here.mean(0)) / max(len(here), 2) ** 0.5
        return here.mean(0) + 1.5 * spread
