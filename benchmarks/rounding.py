"""What rounding does to the noise: its error, what it costs in epsilon, and an attack on it.

    python benchmarks/rounding.py [--numbers 4000000]

Prints the largest error of the computed noise against 80-bit arithmetic on the same key stream,
the extra epsilon and delta by the argument of docs/randomness.md, the outcome of an attack on low
bits with torch.randn and with the package's noise, and the time of exact discrete noise.
"""

from __future__ import annotations

import argparse
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from torch import Tensor

from vitguard.draws import Draws

UNIT = 2.0**-53
RADIUS, SMALL, SUM = 11.0, 4.0, 1.0
"""Error of a number in units of 2^-53 deviations: RADIUS * r + SMALL / r + SUM * (r + s), r its
radius and s the sum, both in deviations (docs/randomness.md)."""

Array = NDArray[Any]


class Recorded:
    """A key stream that keeps what it gave."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.given: list[bytes] = []

    def update_into(self, zeros: bytes, words: bytearray) -> int:
        count = self.stream.update_into(zeros, words)
        self.given.append(bytes(words[:count]))
        return count


def errors(numbers: int) -> tuple[float, float]:
    """Return the largest error in deviations, and the largest share of the bound that it took."""
    draws = Draws()
    recorded = Recorded(draws._stream())
    draws._stream = lambda: recorded  # type: ignore[method-assign]
    pieces = [n.numpy().copy() for _, n in draws._normals(numbers, 1.0)]
    worst = share = 0.0
    for i, given in enumerate(recorded.given[:-1]):  # the last ones are cut
        words = np.frombuffer(given, np.int64).reshape(2, -1)
        inside = np.square(words * 2.0**-63).sum(0) < 1
        exact = np.longdouble(words[:, inside]) / np.longdouble(2) ** 63
        square = np.square(exact).sum(0)
        true = exact * np.sqrt(-2 * np.log(square) / square)
        off = np.abs(pieces[i].reshape(2, -1) - true).astype(float)
        r = np.maximum(np.sqrt(-2 * np.log(square)).astype(float), 1e-12)
        worst = max(worst, float(off.max()))
        share = max(share, float((off / (UNIT * (RADIUS * r + SMALL / r))).max()))
    return worst, share


@dataclass(frozen=True)
class Extra:
    """What rounding adds: (epsilon, delta) to those of exact Gaussian noise."""

    epsilon: float
    delta: float


WIDTH = 2.0**-11  # of a cell of the grid in deviations, at least
CENTRE = 4.1e-7  # largest change of the probability of a cell within two cells of the origin


def change(r: float) -> float:
    """Return how much rounding changes the probability of a cell of a pair at radius r at most."""
    cell = math.exp(r**2 / 4) * (r + 1 / r) * 2.0**-62.5
    return 4.1 / WIDTH * (UNIT * (RADIUS * r + SMALL / r + SUM * (r + 1)) + cell)


def extra(coordinates: float, steps: float, epsilon: float = 8.0, chance: float = 1e-15) -> Extra:
    """Return the extra epsilon and delta of so many released coordinates and steps.

    Args:
        epsilon: The claim, which multiplies `chance` on one side.
        chance: That the sum of the changes passes its bound, for each of two neighbours.
    """
    pairs = coordinates / 2 * steps
    square, _ = quad(lambda r: change(r) ** 2 * r * math.exp(-r * r / 2), WIDTH, 12, limit=500)
    square += 16 * WIDTH**2 / (2 * math.pi) * CENTRE**2
    log = math.log(1 / chance)
    moved = pairs * square + math.sqrt(2 * pairs * square * log) + CENTRE * log / 3
    beyond = pairs * 2.0**-92  # a radius at which the cells of the words are as wide as the grid's
    return Extra(2 * moved, (chance + beyond) * (1 + math.exp(epsilon + moved)))


def worst_case(coordinates: float, steps: float) -> float:
    """Return the extra epsilon if every pair had the change of a radius of 6."""
    return coordinates * steps * change(6.0)


def distinguished(noised: Callable[[Tensor], Tensor], numbers: int) -> dict[float, float]:
    """Return how often a release of 0 and of 1 shows that it cannot be a release of 1.

    A float32 between -1/4 and 1/4 that is no multiple of 2^-24 cannot be 1 plus a float32: the
    noise was then near -1, where float32 numbers are 2^-24 apart.
    """
    shown = {}
    for value in (0.0, 1.0):
        y = noised(torch.full((numbers,), value)).double()
        impossible = (y.abs() < 0.25) & ((y * 2.0**24).frac() != 0)
        shown[value] = float(impossible.double().mean())
    return shown


def plain(total: Tensor) -> Tensor:
    """Add float32 noise of deviation 1 as most code does."""
    return total + 1.0 * torch.randn(total.shape)


def gridded(total: Tensor) -> Tensor:
    """Add noise of deviation 1 by the package's source."""
    return Draws().noised(total, 1.0)


def discrete_gaussian(square: int) -> int:
    """Return an exact discrete Gaussian integer of variance parameter `square`.

    Reference: Canonne, Kamath and Steinke, arXiv:2004.00010, algorithms 1 to 3.
    """
    scale = math.isqrt(square) + 1
    while True:
        number = _discrete_laplace(scale)
        gap = Fraction((abs(number) * scale - square) ** 2, 2 * square * scale**2)
        if _bernoulli_exp(gap):
            return number


def _discrete_laplace(scale: int) -> int:
    while True:
        low = secrets.randbelow(scale)
        if not _bernoulli_exp(Fraction(low, scale)):
            continue
        high = 0
        while _bernoulli_exp(Fraction(1)):
            high += 1
        number = low + scale * high
        if secrets.randbelow(2) == 0:
            return number
        if number:
            return -number


def _bernoulli_exp(gamma: Fraction) -> bool:
    """True with probability exp(-gamma)."""
    while gamma > 1:
        if not _bernoulli_exp(Fraction(1)):
            return False
        gamma -= 1
    k = 1
    while secrets.randbelow(gamma.denominator * k) < gamma.numerator:
        k += 1
    return k % 2 == 1


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numbers", type=int, default=4_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst, share = errors(options.numbers)
    print(
        f"largest error of {options.numbers} numbers: {worst:.3g} deviations, "
        f"{share:.3f} of the bound"
    )
    for name, coordinates in (("5.7e6 (ViT-Ti)", 5.7e6), ("86e6 (ViT-B)", 86e6)):
        for steps in (1, 10**4):
            e = extra(coordinates, steps)
            print(
                f"{name}, {steps} steps: epsilon + {e.epsilon:.2g}, delta + {e.delta:.2g}; "
                f"worst case epsilon + {worst_case(coordinates, steps):.2g}"
            )
    for name, way in (("torch.randn", plain), ("Draws.noised", gridded)):
        shown = distinguished(way, options.numbers)
        print(
            f"{name}: low bits rule 1 out in {shown[0.0]:.4f} of releases of 0, {shown[1.0]:g} of 1"
        )
    started = time.process_time()
    for _ in range(2000):
        discrete_gaussian(1024**2)
    print(
        f"exact discrete Gaussian: {(time.process_time() - started) / 2000 * 1e6:.1f} us a number"
    )


if __name__ == "__main__":
    main()
