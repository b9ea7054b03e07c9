"""Block-wise encryption of images: one secret permutation of the pixels of every block."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import quadratic_assignment
from torch import Tensor

from recipes import Judged
from vitguard.attacks.base import Attack
from vitguard.attacks.position import PositionInversion
from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.core import Batch, Guess, View
from vitguard.defenses.base import BatchDefense, Draws
from vitguard.errors import expected
from vitguard.vit import Anatomy

Keys = NDArray[np.intp]
_DESCENTS = 8  # from the best starts


@dataclass(frozen=True)
class BlockwiseEncryption(BatchDefense):
    """Permute the pixels of every block of an image by the same secret key, drawn anew each time.

    Guarantees:
        None: all blocks share one permutation, and pixels keep their values.

    Args:
        block: Pixels on a side of a block; as the model's patches.
    """

    name: ClassVar[str] = "blockwise-encryption"
    block: int = 4

    def __post_init__(self) -> None:
        if self.block < 1:
            raise expected("blocks of at least 1 pixel", self.block)

    def transform(self, batch: Batch, draws: Draws) -> Batch:
        """Return the batch with its images encrypted; channels of a block are permuted too."""
        images, side = batch.images, self.block
        channels, height, width = images.shape[1:]
        if height % side or width % side:
            raise expected(f"images that {side} divides", (height, width))
        key = draws.uniform(channels * side * side).argsort()
        blocks = torch.nn.functional.unfold(images, side, stride=side)[:, key.tolist()]
        encrypted = torch.nn.functional.fold(blocks, (height, width), side, stride=side)
        return replace(batch, images=encrypted)


@dataclass(frozen=True)
class KeyFromStatistics(Attack):
    """Read the encrypted image off the update, then find the key under which it is a photo.

    `position` gives the encrypted patches. All of them share one key, so the covariance of their
    pixels is that of natural patches with rows and columns permuted: a quadratic assignment
    problem. It is solved by graph matching from random starts and descent over swaps of values,
    pixels, rows, columns and channels. Mirror images of a patch are as likely; the seams between
    patches tell them apart. Red and blue are alike to the prior.

    Args:
        starts: Random starts of the graph matching.
        kicks: Times that the best key so far is disturbed and descended from again.
    """

    name: ClassVar[str] = "key-from-statistics"
    family: ClassVar[str] = "closed-form"
    starts: int = 40
    kicks: int = 40

    def run(self, view: View, generator: torch.Generator) -> Guess:
        """Return the decrypted image."""
        anatomy = Anatomy.of(view.model)
        encrypted = PositionInversion().run(view, generator)
        seen = anatomy.patchify(view.normalization.apply(encrypted.images.double()))[0]
        prior = NaturalImages.of(view, anatomy)
        shape = (anatomy.channels, *anatomy.patch_size)
        cost = _Cost.of(prior, seen - prior.mean, generator)
        chance = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        key = cost.found(shape, chance, starts=self.starts, kicks=self.kicks)
        key = _by_seams(prior, seen, key, shape)
        pixels = view.normalization.invert(anatomy.unpatchify(seen[None, :, key.tolist()]))
        return Guess(pixels.clamp(0, 1))


@dataclass(frozen=True)
class _Cost:
    """What keys cost: the negative log-likelihood of the patches, each by itself."""

    precision: np.ndarray
    natural: np.ndarray
    seen: np.ndarray

    @staticmethod
    def of(prior: NaturalImages, seen: Tensor, generator: torch.Generator) -> _Cost:
        shape = (400, len(prior.mixing), *prior.spread.shape)
        white = torch.randn(shape, generator=generator)
        drawn = (prior.colour(white.to(seen)) - prior.mean).flatten(0, 1)
        natural, own = (t.T @ t / len(t) for t in (drawn, seen))
        precision = torch.linalg.inv(natural)
        return _Cost(precision.numpy(), (natural / natural.trace()).numpy(), own.numpy())

    def each(self, keys: Keys) -> np.ndarray:
        return np.einsum("ab,nab->n", self.precision, self.seen[keys[:, :, None], keys[:, None]])

    def one(self, key: Keys) -> float:
        return float(self.each(key[None])[0])

    def found(
        self, shape: tuple[int, int, int], chance: np.random.Generator, *, starts: int, kicks: int
    ) -> Keys:
        """Return the likeliest key of these starts and kicks."""
        moves = np.concatenate([_swaps(shape), _turns(shape)])
        begun = sorted((self.matched(chance) for _ in range(starts)), key=self.one)
        key = min((self.descended(k, moves) for k in begun[:_DESCENTS]), key=self.one)
        for _ in range(kicks):
            kicked = key
            for move in chance.choice(moves, 3):
                kicked = kicked[move]
            key = min(key, self.descended(kicked, moves), key=self.one)
        return key

    def matched(self, chance: np.random.Generator) -> Keys:
        """Return a key by graph matching of the two covariances, from a random start."""
        options = {"maximize": True, "P0": "randomized", "rng": chance}
        return quadratic_assignment(self.natural, self.seen, options=options).col_ind

    def descended(self, key: Keys, moves: Keys) -> Keys:
        """Return the key after the best of all moves, again and again, until none is better."""
        while True:
            made = key[moves]
            costs = self.each(made)
            if not costs.min() < self.one(key) - 1e-9:
                return key
            key = made[costs.argmin()]


def _swaps(shape: tuple[int, int, int]) -> Keys:
    """Return every order in which two values, or two pixels of all channels, change places."""
    places = np.arange(math.prod(shape)).reshape(shape[0], -1)
    made = []
    for first, second in combinations(range(places.size), 2):
        order = places.reshape(-1).copy()
        order[[first, second]] = order[[second, first]]
        made.append(order)
    for first, second in combinations(range(places.shape[1]), 2):
        order = places.copy()
        order[:, [first, second]] = order[:, [second, first]]
        made.append(order.reshape(-1))
    return np.stack(made)


def _turns(shape: tuple[int, int, int]) -> Keys:
    """Return every order of the channels, of the rows, and of the columns, and the transpose."""
    places = np.arange(math.prod(shape)).reshape(shape)
    made = [places.take(p, axis) for axis in range(3) for p in permutations(range(shape[axis]))]
    made += [places.swapaxes(1, 2)] if shape[1] == shape[2] else []
    return np.stack([order.reshape(-1) for order in made])


def _mirrors(shape: tuple[int, int, int]) -> Keys:
    """Return the orders under which a patch is turned or mirrored."""
    places = np.arange(math.prod(shape)).reshape(shape)
    square = (places, places.swapaxes(1, 2)) if shape[1] == shape[2] else (places,)
    axes = ((), (1,), (2,), (1, 2))
    return np.stack([np.flip(p, axis).reshape(-1) for p in square for axis in axes])


def _by_seams(prior: NaturalImages, seen: Tensor, key: Keys, shape: tuple[int, int, int]) -> Keys:
    """Return the key of the likeliest whole image, by turns of what every patch shows."""
    turns, mirrors, least = _turns(shape), _mirrors(shape), float("inf")
    while True:
        made = key[turns][:, mirrors].reshape(-1, len(key))
        images = seen[:, made.tolist()].movedim(1, 0)
        energies = prior.whiten(images).square().flatten(1).sum(1)
        if not float(energies.min()) < least - 1e-6:
            return key
        key, least = made[int(energies.argmin())], float(energies.min())


JUDGED = Judged(
    title="Block-wise encryption of images",
    place="keys",
    source="Aso, Shiota, Kiya, arXiv:2408.05737; Nagamori, Kiya, arXiv:2301.09255",
    claim="Clients encrypt their images block by block with keys of their own, which they may "
    "throw away, and the visual content stays secret while a ViT learns from them.",
    rebuilt="One random permutation of the 48 values of a block, for all blocks of an image, "
    "channels included, drawn anew for each update; blocks stay in place.",
    threat="The key is the client's, used once, and unknown.",
    stack=(BlockwiseEncryption(),),
    attack=KeyFromStatistics(),
    found="All blocks share the key, so that the statistics of photos give it away: of 64 blocks a "
    "picture is told from its decoys, with pixels in place up to exchanges that look alike, such "
    "as red and blue; of 256 blocks, in the figure above, the key is found.",
    images=2,
)
