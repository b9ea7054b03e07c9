"""The one source of secret randomness: noise, masks, permutations, sampling, rounding.

Every request takes a fresh 256-bit key from the operating system and expands it by AES-256 in
counter mode. So there is no state that a checkpoint could hold, that a fork, copy or thread could
repeat, or that a search could find. `torch.Generator` is no such source: on a CPU it uses 32 bits
of its seed, which an adversary tries in minutes.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from vitguard.errors import expected

__all__ = ["Draws"]

_BLOCK = 1 << 15  # words of the key stream used at once: they stay in the cache
_GRID = 1024  # steps of the release in one standard deviation of its noise
_LEAST = 1e-250  # deviation whose grid float64 holds
_KEY = 32  # bytes
_PUBLIC_KEY = bytes(_KEY)  # of seeded draws, which are no secret


class Draws:
    """A source of secret draws. It has no state; copies and pickles are fresh sources.

    Guarantees:
        No two requests share a draw: over threads, forks, copies, pickles and restarts.
        `noised` adds Gaussian noise whose rounding is accounted for (docs/randomness.md).

    Args:
        generator: Makes the draws a function of its state, for tests and for audits of one's own
            data. The generator is then what must stay secret, and 32 bits of seed are none: every
            guarantee is `void`. It is kept as `seeded`.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.redraw(generator)

    def __repr__(self) -> str:
        return "Draws(seeded)" if self.seeded else "Draws()"

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(self), ())

    def __deepcopy__(self, memo: dict[int, Any]) -> Draws:
        return type(self)()

    @property
    def void(self) -> str:
        """Why a guarantee that rests on these draws is void, "" where it holds."""
        return "drawn from a torch.Generator, whose seed can be searched" if self.seeded else ""

    def redraw(self, generator: torch.Generator | None) -> None:
        """Draw from `generator` from now on; None for the operating system."""
        self.seeded = generator
        self._examples = _PUBLIC_KEY if generator is not None else secrets.token_bytes(_KEY)

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` uniform 64-bit words.

        Raises:
            InputError: `count` is no whole number, such as a shape: take `normal` for shapes.
        """
        if not isinstance(count, int | np.integer) or isinstance(count, bool) or count < 0:
            raise expected("a count of draws, a whole number", repr(count), "Reshape the result.")
        return np.frombuffer(self._stream().update(bytes(8 * count)), np.uint64)

    def uniform(self, count: int) -> Float[NDArray, " count"]:
        """Return `count` numbers in [0, 1), float64, multiples of 2^-53."""
        return (self.words(count) >> np.uint64(11)) * 2.0**-53

    def chosen(self, count: int, rate: float) -> Bool[NDArray, " count"]:
        """Return `count` independent choices, each true with probability `rate` to 2^-64.

        Raises:
            InputError: `rate` is outside [0, 1].
        """
        if not 0 <= rate <= 1:
            raise expected("a rate in [0, 1]", rate)
        if rate == 1:
            return np.ones(len(self.words(count)), dtype=bool)
        return self.words(count) < np.uint64(math.ldexp(rate, 64))

    def key(self) -> int:
        """Return a number in [0, 2^63) that names one example or batch for `keyed`."""
        return int(self.words(1)[0] >> np.uint64(1))

    def keys(self, count: int) -> Tensor:
        """Return `count` of them, shape (count,), int64."""
        return torch.from_numpy((self.words(count) >> np.uint64(1)).view(np.int64))

    def keyed(self, keys: Tensor, count: int, *, stream: int) -> Float[NDArray, "batch count"]:
        """Return `count` numbers in [0, 1) for each key: equal for equal keys, in any batch.

        A pseudorandom function (AES-256 under this source's own key) of key, stream and place. In a
        copy of the source the same keys give other numbers, but for seeded draws.

        Args:
            keys: Shape (batch,), int64.
            stream: One for each purpose, in [0, 2^32).
        """
        half = -(-count // 2)  # a block of the cipher holds two numbers
        blocks = np.empty((len(keys), half, 2), np.uint64)
        blocks[..., 0] = keys.numpy().view(np.uint64)[:, None]
        blocks[..., 1] = np.arange(half, dtype=np.uint64) + np.uint64(stream << 32)
        cipher = _cipher(self._examples)
        numbers = np.frombuffer(cipher.update(blocks.tobytes()), np.uint64)
        return ((numbers >> np.uint64(11)) * 2.0**-53).reshape(len(keys), 2 * half)[:, :count]

    def normal(self, shape: tuple[int, ...] | torch.Size, *, like: Tensor | None = None) -> Tensor:
        """Return standard normal numbers, float64, or of the dtype and device of `like`."""
        out = torch.empty(math.prod(shape), dtype=torch.float64 if like is None else like.dtype)
        for at, numbers in self._normals(len(out), 1.0):
            out[at : at + len(numbers)] = numbers
        return out.reshape(shape) if like is None else out.reshape(shape).to(like.device)

    def noised(self, total: Tensor, deviation: float) -> Tensor:
        """Return `total` with Gaussian noise of standard deviation `deviation`, fit to be released.

        The noisy sum is rounded to multiples of a power of two, at most a 1024th of the deviation,
        so that its low bits tell nothing of `total`. A deviation of 0 returns `total` as it is.

        Raises:
            InputError: The deviation is negative, not finite, or above 0 and below 1e-250.
        """
        if not 0 <= deviation < math.inf:
            raise expected("a finite standard deviation of at least 0", deviation)
        if deviation == 0:
            return total
        if deviation < _LEAST:
            raise expected(f"a standard deviation of 0 or at least {_LEAST:g}", deviation)
        grid = 2.0 ** math.floor(math.log2(deviation / _GRID))
        flat = total.detach().to("cpu").reshape(-1)
        out = torch.empty(len(flat), dtype=total.dtype)
        for at, numbers in self._normals(len(flat), deviation / grid):
            numbers.add_(flat[at : at + len(numbers)], alpha=1 / grid)
            out[at : at + len(numbers)] = numbers.round_().mul_(grid)
        return out.reshape(total.shape).to(total.device)

    def noised_all(self, totals: Mapping[str, Tensor], deviation: float) -> dict[str, Tensor]:
        """Return every tensor `noised`; the small ones together, which saves most of their time."""
        small = [k for k, t in totals.items() if t.numel() < _BLOCK]
        flat = [totals[k].detach().to("cpu", torch.float64).reshape(-1) for k in small]
        joined = self.noised(torch.cat(flat), deviation) if small else torch.empty(0)
        parts = dict(zip(small, joined.split([len(f) for f in flat]), strict=True))
        return {
            k: parts[k].reshape(t.shape).to(t) if k in parts else self.noised(t, deviation)
            for k, t in totals.items()
        }

    def public_generator(self) -> torch.Generator:
        """Return a generator for what is published anyway, such as starting weights."""
        return torch.Generator().manual_seed(int(self.words(1)[0] >> np.uint64(2)))

    def _stream(self) -> Any:
        """Return the key stream of one request."""
        if self.seeded is None:
            key = secrets.token_bytes(_KEY)
        else:
            words = torch.randint(
                -(2**63), 2**63 - 1, (4,), generator=self.seeded, device=self.seeded.device
            )
            key = words.cpu().numpy().tobytes()
        return _cipher(key, counter=True)

    def _normals(self, count: int, deviation: float) -> Iterator[tuple[int, Tensor]]:
        """Yield (place, float64 numbers of this standard deviation) until there are `count`.

        Marsaglia's polar method: points of the square that lie in the unit disc give two numbers
        each. Coordinates have 63 bits, so that tails, made at small radii, have no gaps. Of a block
        the first coordinates come first, then the second ones.
        """
        update = self._stream().update_into
        block = min(_BLOCK, 2 * count + 32)
        zeros, words = bytes(8 * block), bytearray(8 * block + 15)
        whole = np.frombuffer(words, np.int64, block)
        points = np.empty((2, block // 2))
        square, other = np.empty((2, block // 2))
        at = 0
        while at < count:
            update(zeros, words)
            np.multiply(whole.reshape(2, -1), 2.0**-63, out=points)
            np.multiply(points[0], points[0], out=square)
            np.multiply(points[1], points[1], out=other)
            np.add(square, other, out=square)
            inside = np.flatnonzero(square < 1)
            radius = square.take(inside)
            scale = np.log(radius)
            scale *= -2 * deviation**2
            scale /= radius
            np.sqrt(scale, out=scale)
            numbers = points.take(inside, axis=1)
            numbers *= scale
            numbers = numbers.reshape(-1)[: count - at]
            if len(numbers):
                yield at, torch.from_numpy(numbers)
            at += len(numbers)


def _cipher(key: bytes, *, counter: bool = False) -> Any:
    """Return AES-256: the key stream of a counter from zero, or the block function itself."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    mode = modes.CTR(bytes(16)) if counter else modes.ECB()
    return Cipher(algorithms.AES(key), mode).encryptor()
