"""Many starts, few tokens: collect the true tokens of every position.

Each round gives every unfinished position a few starts: the minimum-norm member, flat and ramped
patches of random colours, and what was already found at other positions (or, where many tokens
share one position, random mixtures of what was found there). In a batch the tokens found tell what
the tokens of each image attend to, and starts are pulled there (`_groups`, `Pull`): without that
nearly all starts end at the one image that is easiest to find. A start that ends below `accept` is
a token: local minima end a hundred times above.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitguard.attacks._family import Solver
from vitguard.attacks._groups import group_tokens
from vitguard.attacks._mlp import Mlp
from vitguard.attacks._newton import Problem, Pull
from vitguard.core import Normalization
from vitguard.vit import Anatomy

__all__ = ["Found", "Search"]

_PULL = (-0.3, 0.8)  # decades of its strength
_UNGUIDED = 3  # in a batch, every third round also starts without a pull
_AWAY = 0.6  # of the distance to what other images attend to, by which a pull may overshoot

_LOG = logging.getLogger("vitguard.attacks")
_SAME = 1e-3  # root mean square below which two patches are one, in model-input units


@dataclass(frozen=True)
class Found:
    """Tokens that verified themselves.

    Args:
        position: Row of the family each token belongs to, shape (tokens,).
        y: Their unknowns, shape (tokens, unknowns).
        patch: Their patches, shape (tokens, pixels).
        residual: Relative residuals, shape (tokens,).
    """

    position: Int[Tensor, " tokens"]
    y: Float[Tensor, "tokens unknowns"]
    patch: Float[Tensor, "tokens pixels"]
    residual: Float[Tensor, " tokens"]


@dataclass
class Search:
    """One search over the positions of a solver's family.

    Args:
        wanted: Tokens wanted at each position, shape (positions,).
        near: By position, residual and patch of the best candidate that was not accepted.
        deadline: `time.monotonic()` after which no start is begun.
        accept: Residual below which a token counts as found.
    """

    solver: Solver
    mlp: Mlp
    anatomy: Anatomy
    normalization: Normalization
    wanted: Int[Tensor, " positions"]
    deadline: float
    generator: torch.Generator
    accept: float = 1e-3
    patience: int = 40
    found: Found = field(init=False)
    near: dict[int, tuple[float, Tensor]] = field(default_factory=dict)
    _rounds: int = 0
    _idle: int = 0

    def __post_init__(self) -> None:
        free = max(self.solver.free(1e-2), 2)
        self._rough = self._problem(free)
        self._quick = Problem.of(self.mlp, self.solver, self._rough.family, torch.float32)
        # Weakly determined directions are noisy: the final steps leave them to the MLP.
        self._fine = self._problem(self.solver.free(3e-2) + 20)
        self._most = 4 if len(self.mlp.bias) * free > 5e4 else 12  # starts of one kind
        self._inverse = torch.linalg.pinv(
            self.solver.patch @ self._rough.family.directions[: self.solver.patch.shape[1]],
            rtol=1e-3,
        )
        empty = self.solver.columns.new_zeros
        self.found = Found(
            torch.zeros(0, dtype=torch.long, device=self.solver.columns.device),
            empty(0, len(self.solver.columns)), empty(0, self.anatomy.patch_pixels), empty(0),
        )  # fmt: skip

    def _problem(self, k: int) -> Problem:
        k = min(k, len(self.solver.values) - 1)
        return Problem.of(self.mlp, self.solver, self.solver.family(k))

    @property
    def basis(self) -> Float[Tensor, "pixels directions"]:
        """Orthonormal directions in which the patches of the family move."""
        moved = self.solver.patch @ self._rough.family.directions[: self.solver.patch.shape[1]]
        left, values, _ = torch.linalg.svd(moved, full_matrices=False)
        return left[:, values > 1e-6 * values[0]]

    @property
    def free(self) -> int:
        """Directions that the linear equations leave free."""
        return self._rough.family.directions.shape[1]

    @property
    def done(self) -> bool:
        """Whether every position has as many tokens as were wanted."""
        return not bool(self.missing().any())

    def run(self, rounds: int) -> str:
        """Search for some rounds; return `done`, `time`, `idle`, or `""` where more may help."""
        for _ in range(rounds):
            if self.done:
                return "done"
            if time.monotonic() > self.deadline:
                return "time"
            new = 0
            if self.grouped and len(self.found.position):
                new = self._harvest(*self._guided(self.missing()))
            if not self.done and (not new or self._rounds % _UNGUIDED == 0):
                each = 1 if new else min(1 + self._rounds, self._most)
                new += self._harvest(*self._starts(self.missing(), each))
            self._rounds += 1
            self._idle = 0 if new else self._idle + 1
            _LOG.info("round %d: %d tokens found, %d wanted", self._rounds,
                      len(self.found.position), int(self.missing().sum()))  # fmt: skip
        # Without a single token the update is hardly one of these images': give up early.
        patience = self.patience if len(self.found.position) else 4
        return "done" if self.done else "idle" if self._idle >= patience else ""

    def seed(self, positions: Tensor, patches: Float[Tensor, "tokens pixels"]) -> int:
        """Start from given patches; return how many tokens that brought."""
        new = 0
        if not len(positions):
            return 0
        for p, x in zip(positions.split(32), patches.split(32), strict=True):
            v = [self.project(int(i), row[None]) for i, row in zip(p, x, strict=True)]
            new += self._accept(p, torch.cat(v), None)
        self._idle = 0 if new else self._idle
        return new

    def add(self, position: int, patch: Float[Tensor, " pixels"], residual: float) -> None:
        """Take a token that was proved in another way, a repeated one included."""
        where = torch.tensor([position], device=self.found.position.device)
        y = self._rough.family.at(where, self.project(position, patch[None]))
        self._append(where, y, patch[None], y.new_tensor([residual]))

    def _append(self, positions: Tensor, y: Tensor, patch: Tensor, residual: Tensor) -> None:
        old = self.found
        self.found = Found(
            torch.cat([old.position, positions]), torch.cat([old.y, y]),
            torch.cat([old.patch, patch]), torch.cat([old.residual, residual]),
        )  # fmt: skip

    def missing(self) -> Int[Tensor, " positions"]:
        """Return how many tokens each position lacks."""
        counts = torch.bincount(self.found.position, minlength=len(self.wanted))
        return (self.wanted - counts).clamp_min(0)

    def groups(
        self, some: Tensor | None = None, images: int | None = None
    ) -> tuple[Int[Tensor, " tokens"], Float[Tensor, "images attended"]]:
        """Return which image each token found is of, as far as attention tells, and their means.

        Args:
            some: Which tokens, all where None.
            images: That they are of, the batch where None.
        """
        rows = slice(None) if some is None else some
        attended = self._attended(self.found.y)[rows]
        return group_tokens(attended, self.found.position[rows], images or int(self.wanted.max()))

    @property
    def grouped(self) -> bool:
        """Whether there are several images, each with one token at every position."""
        return len(self.wanted) == self.anatomy.patches and int(self.wanted.max()) > 1

    def _attended(self, y: Tensor) -> Tensor:
        return y[:, self.solver.patch.shape[1] : self.solver.scale_index]

    def _guided(self, missing: Tensor) -> tuple[Tensor, Tensor, Pull]:
        """Starts pulled to the attended values of each image that has no token at a position.

        Images of which no token is known lie beyond the mean member, as seen from the known ones.
        """
        found, family = self.found, self._rough.family
        positions, starts, targets = [], [], []
        groups, centers = self.groups()
        for i in torch.nonzero(missing)[:, 0].tolist():
            here = found.position == i
            mean = self._attended(family.origin[i : i + 1])
            absent = sorted(set(range(len(centers))) - set(groups[here].tolist()))
            if len(centers) < int(self.wanted.max()):
                known = centers[groups[here]].mean(0) if bool(here.any()) else centers.mean(0)
                draw = 0.5 + 1.5 * torch.rand((), generator=self.generator).to(mean)
                targets.append(mean + draw * (mean - known))
                starts.append(family.origin.new_zeros(1, self.free))
                positions.append(i)
            for group in absent:
                near = self._nearest(i, groups == group)
                starts += [family.origin.new_zeros(1, self.free), self.project(i, near)]
                targets += [self._caricature(centers, group) for _ in range(2)]
                positions += [i, i]
        where = torch.tensor(positions, dtype=torch.long, device=missing.device)
        low, high = _PULL
        draw = torch.rand(len(positions), generator=self.generator).to(family.origin)
        pull = Pull(torch.cat(targets), 10 ** (low + (high - low) * draw))
        return where, torch.cat(starts), pull

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
        columns, where = self.anatomy.grid[1], self.found.position[mask]
        rows = (where // columns - position // columns).abs()
        distance = rows + (where % columns - position % columns).abs()
        return self.found.patch[mask][distance.argmin()][None]

    def _starts(self, missing: Tensor, each: int) -> tuple[Tensor, Tensor, None]:
        """Return positions and coordinates of starts without a pull, `each` of every kind."""
        origin, positions, starts = self._rough.family.origin, [], []
        for i in torch.nonzero(missing)[:, 0].tolist():
            crowd = int(self.wanted[i]) > 8
            count = 8 * min(int(self.wanted[i]), 16) if crowd else each
            here = self.found.position == i
            targets = [self._textures(count)]
            if crowd and bool(here.any()):
                targets.append(self._mixtures(here, count))
            elif bool(here.any()):
                targets.append(self._opposites(i, count))
            elif len(self.found.position):
                targets.append(self._elsewhere(i, count))
                targets.append(self._mixtures(torch.ones_like(here), count))
            v = self.project(i, torch.cat(targets))
            if self._rounds == 0:
                v = torch.cat([origin.new_zeros(1, self.free), v])
            positions.append(torch.full((len(v),), i, device=v.device))
            starts.append(v)
        return torch.cat(positions), torch.cat(starts), None

    def base(self, position: int) -> Float[Tensor, "one pixels"]:
        """Return the minimum-norm patch at a position."""
        return self.solver.pixels(self._rough.family.origin[position : position + 1])

    def project(self, position: int, patches: Tensor) -> Tensor:
        """Coordinates of the members whose patches come nearest."""
        return (patches - self.base(position)) @ self._inverse.T

    def _normal(self, *shape: int) -> Tensor:
        draw = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return draw.to(self.found.y)

    def _textures(self, count: int) -> Tensor:
        """Patches with the spectrum of photos: random level, noise falling as 1 / frequency^2."""
        channels, (height, width) = self.anatomy.channels, self.anatomy.patch_size
        down = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
        across = torch.fft.rfftfreq(width, dtype=torch.float64)
        frequency = (down.square() + across.square()).clamp_min(1 / max(height, width) ** 2)
        grey = self._normal(count, 1, height, width) + 0.3 * self._normal(
            count, channels, height, width
        )
        noise = torch.fft.irfft2(
            torch.fft.rfft2(grey) / frequency.to(grey.device), s=(height, width)
        )
        noise = noise / noise.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-9)
        strength = 0.15 * self._normal(count, 1, 1, 1)
        level = 0.5 + 0.3 * self._normal(count, 1, 1, 1) + 0.1 * self._normal(count, channels, 1, 1)
        return self.normalization.apply((level + strength * noise).clamp(0, 1)).flatten(1)

    def _any(self, count: int) -> Tensor:
        patch = self.found.patch
        return patch[torch.randint(len(patch), (count,), generator=self.generator).to(patch.device)]

    def _elsewhere(self, position: int, count: int) -> Tensor:
        """Patches found at other positions, near ones first."""
        columns, where = self.anatomy.grid[1], self.found.position
        rows = (where // columns - position // columns).abs()
        distance = rows + (where % columns - position % columns).abs()
        jitter = torch.rand(len(where), generator=self.generator).to(self.found.y)
        return self.found.patch[(distance + 2 * jitter).argsort()[:count]]

    def _opposites(self, position: int, count: int) -> Tensor:
        """Beyond the minimum-norm member as seen from what was found here.

        That member lies among the true ones, so the others are on its far side.
        """
        here = self.found.patch[self.found.position == position].mean(0)
        base = self.base(position)
        some = torch.rand(count, 1, generator=self.generator).to(base) + 0.5
        return base + some * (base - here) + 0.5 * (self._any(count) - self._any(count))

    def _mixtures(self, rows: Tensor, count: int) -> Tensor:
        """Draws from the mean and covariance of some of the found patches."""
        here = self.found.patch[rows]
        spread = self._normal(count, len(here)) @ (here - here.mean(0)) / max(len(here), 2) ** 0.5
        return here.mean(0) + 1.5 * spread

    def _harvest(self, positions: Tensor, start: Tensor, pull: Pull | None) -> int:
        """Iterate all starts, in slices that respect the deadline; return how many were new."""
        new = 0
        for rows in torch.arange(len(positions), device=positions.device).split(64):
            rows = rows[self.missing()[positions[rows]] > 0]
            if len(rows):
                drawn = None if pull is None else Pull(pull.target[rows], pull.strength[rows])
                new += self._accept(positions[rows], start[rows], drawn)
            if time.monotonic() > self.deadline:
                break
        return new

    def _accept(self, positions: Tensor, start: Tensor, pull: Pull | None) -> int:
        rough = self._quick.solve(positions, start.float(), iterations=20, pull=pull)
        good = rough.residual < 10 * self.accept
        if not bool(good.any()):
            return 0
        positions = positions[good]
        y = self._rough.family.at(positions, rough.v[good].double())
        keep = self._distinct(positions, self.solver.pixels(y), 30 * _SAME)
        positions, y = positions[keep], y[keep]
        fine = self._fine.solve(
            positions, self._fine.family.coordinates(positions, y), iterations=20
        )
        y = self._fine.family.at(positions, fine.v)
        good = fine.residual < self.accept
        self._remember(positions[~good], self.solver.pixels(y[~good]), fine.residual[~good])
        positions, y, residual = positions[good], y[good], fine.residual[good]
        patch = self.solver.pixels(y)
        keep = self._distinct(positions, patch, _SAME)
        self._append(positions[keep], y[keep], patch[keep], residual[keep])
        return len(keep)

    def _remember(self, positions: Tensor, patches: Tensor, residuals: Tensor) -> None:
        """Keep the best candidate that just missed: noise can hide a true token."""
        for i, patch, residual in zip(positions.tolist(), patches, residuals.tolist(), strict=True):
            if residual < min(10 * self.accept, self.near.get(i, (1.0, patch))[0]):
                self.near[i] = (residual, patch)

    def _distinct(self, positions: Tensor, patch: Tensor, same: float) -> Tensor:
        """Indices of tokens that are neither found already nor repeated, and still wanted."""
        place = torch.cat([self.found.position, positions])
        content = torch.cat([self.found.patch, patch])
        known, keep = list(range(len(self.found.position))), []
        room = self.missing()
        for i in range(len(positions)):
            p = int(positions[i])
            rivals = [j for j in known if int(place[j]) == p]
            gap = (content[rivals] - patch[i]).square().mean(1).sqrt() if rivals else patch[:0, 0]
            if bool((gap > same).all()) and int(room[p]) > 0:
                keep.append(i)
                room[p] -= 1
                known.append(len(self.found.position) + i)
        return torch.tensor(keep, dtype=torch.long, device=positions.device)
