"""Statistics of the package's Gaussian numbers, and their speed beside torch.randn.

    python benchmarks/randomness.py [--numbers 100000000] [--rounds 11] [--threads 1]

Prints a p-value for each test. Uniform bits are the cipher's; what is tested is what is made of
them: chi-square and Kolmogorov-Smirnov against the normal distribution, moments, autocorrelation,
tails, the two numbers that share a radius, the low bits of the uniforms behind them, and numbers
that come twice. All p-values together are judged by Bonferroni's rule.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtr

from vitguard.draws import Draws

Array = NDArray[Any]
Sampler = Callable[[int], Array]
"""Returns that many standard normal numbers, float64; a multiple of `BLOCK`."""

BLOCK = 1 << 14
"""Half as many pairs: their first numbers, then the second ones."""
CHUNK = 64 * BLOCK
FINE, COARSE, SIDE, PLACES = 1 << 16, 1 << 12, 64, 256
LAGS = (1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 64, 127, 128, 1024, BLOCK // 2, BLOCK)
TAILS = (3.0, 4.0, 4.5, 5.0, 6.0)
BITS = (16, 24, 32)
KEPT = 16
"""One number in so many is compared with all others: a block that comes twice is longer."""


class Tally:
    """Counts of what the tests need, over as many chunks as are added."""

    def __init__(self) -> None:
        self.count = 0
        self.fine = np.zeros(FINE, np.int64)
        self.pairs = {n: np.zeros((SIDE, SIDE), np.int64) for n in ("partners", "neighbours")}
        self.places = {
            (n, b): np.zeros(PLACES, np.int64) for n in ("radius", "angle") for b in BITS
        }
        self.powers = np.zeros(4)
        self.lagged = dict.fromkeys(LAGS, (0.0, 0))
        self.beyond = dict.fromkeys(TAILS, 0)
        self.squares = 0.0
        self.kept: list[Array] = []

    def add(self, x: Array) -> None:
        """Count a chunk, shape (a multiple of BLOCK,)."""
        self.count += len(x)
        uniform = ndtr(x)
        self.fine += np.bincount(np.minimum((uniform * FINE).astype(int), FINE - 1), minlength=FINE)
        cell = np.minimum((uniform * SIDE).astype(int), SIDE - 1)
        first, second = np.moveaxis(x.reshape(-1, 2, BLOCK // 2), 1, 0)
        halves = cell.reshape(-1, 2, BLOCK // 2)
        self._pair("partners", halves[:, 0].ravel(), halves[:, 1].ravel())
        self._pair("neighbours", cell[::2], cell[1::2])
        self.squares += float(((first**2 - 1) * (second**2 - 1)).sum())
        behind = {
            "radius": np.exp(-(first**2 + second**2) / 2).ravel(),
            "angle": np.arctan2(second, first).ravel() / (2 * math.pi) + 0.5,
        }
        for (name, bits), counts in self.places.items():
            low = np.modf(behind[name] * 2.0**bits)[0] * PLACES
            counts += np.bincount(np.minimum(low.astype(int), PLACES - 1), minlength=PLACES)
        self.powers += [float((x**k).sum()) for k in (1, 2, 3, 4)]
        for lag, (total, n) in self.lagged.items():
            self.lagged[lag] = total + float(x[:-lag] @ x[lag:]), n + len(x) - lag
        for edge in TAILS:
            self.beyond[edge] += int((np.abs(x) > edge).sum())
        self.kept.append(x[::KEPT].copy())

    def _pair(self, name: str, first: Array, second: Array) -> None:
        counts = np.bincount(first * SIDE + second, minlength=SIDE**2)
        self.pairs[name] += counts.reshape(SIDE, SIDE)

    def p_values(self) -> dict[str, float]:
        """Return the p-value of each test of the numbers added so far."""
        n = self.count
        found = {"chi-square": _flat(self.fine.reshape(COARSE, -1).sum(1))}
        gaps = np.abs(np.cumsum(self.fine) / n - np.arange(1, FINE + 1) / FINE)
        found["Kolmogorov-Smirnov"] = float(stats.kstwobign.sf(gaps.max() * math.sqrt(n)))
        # E x^k and the variance of x^k of a standard normal number
        for k, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            z = (self.powers[k - 1] - n * mean) / math.sqrt(n * variance)
            found[f"moment {k}"] = _two_sided(z)
        for lag, (total, terms) in self.lagged.items():
            found[f"lag {lag}"] = _two_sided(total / math.sqrt(terms))
        for edge, count in self.beyond.items():
            chance = 2 * float(stats.norm.sf(edge))
            found[f"beyond {edge:g}"] = _count_p(count, n, chance)
        for name, counts in self.pairs.items():
            found[name] = _flat(counts.ravel())
        found["squares of partners"] = _two_sided(self.squares / math.sqrt(4 * n / 2))
        for (name, bits), counts in self.places.items():
            found[f"{name} past bit {bits}"] = _flat(counts)
        kept = np.sort(np.concatenate(self.kept))
        ties = int((kept[1:] == kept[:-1]).sum())
        # two are equal with a chance of 2^-52 at most: their exponents agree and then their bits
        expected = len(kept) ** 2 / 2 * 2.0**-52
        found["equal numbers"] = float(stats.poisson.sf(ties - 1, expected)) if ties else 1.0
        return found


def _flat(counts: Array) -> float:
    return float(stats.chisquare(counts).pvalue)


def _two_sided(z: float) -> float:
    return 2 * float(stats.norm.sf(abs(z)))


def _count_p(count: int, n: int, chance: float) -> float:
    lower, upper = stats.binom.cdf(count, n, chance), stats.binom.sf(count - 1, n, chance)
    return min(1.0, 2 * min(float(lower), float(upper)))


def tally(sampler: Sampler, numbers: int) -> dict[str, float]:
    """Return the p-values of at least so many numbers, whole chunks."""
    counts = Tally()
    for _ in range(-(-numbers // CHUNK)):
        counts.add(sampler(CHUNK))
    return counts.p_values()


def verdict(p_values: dict[str, float]) -> float:
    """Return the p-value of all tests together, by Bonferroni's rule."""
    return min(1.0, len(p_values) * min(p_values.values()))


def grid_p(numbers: int, deviation: float = 1.0) -> float:
    """Return the chi-square p-value of `noised` zeros, each multiple of the grid a bin of its own.

    Multiples with fewer than 20 expected numbers are put together on either side.
    """
    grid = 2.0 ** math.floor(math.log2(deviation / 1024))
    width = math.ceil(9 * deviation / grid)
    counts = np.zeros(2 * width + 1, np.int64)
    for _ in range(-(-numbers // CHUNK)):
        noisy = Draws().noised(torch.zeros(CHUNK, dtype=torch.float64), deviation).numpy()
        places = np.rint(noisy / grid).astype(int)
        if not np.array_equal(places * grid, noisy):
            return 0.0
        counts += np.bincount(np.clip(places + width, 0, 2 * width), minlength=2 * width + 1)
    edges = (np.arange(-width, width) + 0.5) * grid / deviation
    chances = np.diff(np.concatenate([[0.0], ndtr(edges), [1.0]]))
    wide = chances * counts.sum() >= 20
    first, last = np.flatnonzero(wide)[[0, -1]]
    expected = np.concatenate(
        [[chances[:first].sum()], chances[first : last + 1], [chances[last + 1 :].sum()]]
    )
    seen = np.concatenate(
        [[counts[:first].sum()], counts[first : last + 1], [counts[last + 1 :].sum()]]
    )
    expected *= seen.sum() / expected.sum()
    return float(stats.chisquare(seen, expected).pvalue)


def own(count: int) -> Array:
    """Return numbers of the package's source, both of a pair half a block apart."""
    # a piece of the source holds the first numbers of its pairs, then the second; the last is cut
    pieces = [n.numpy() for _, n in Draws()._normals(count + 8 * BLOCK, 1.0)][:-1]
    first, second = np.concatenate([p.reshape(2, -1) for p in pieces], 1)[:, : count // 2]
    halves = [x.reshape(-1, BLOCK // 2) for x in (first, second)]
    return np.stack(halves, axis=1).ravel()


def speed(rounds: int, size: int) -> dict[str, float]:
    """Return median seconds of each way to noise `size` float32 values, interleaved."""
    total = torch.zeros(size)
    ways = {
        "torch.randn": lambda: total + 3.7 * torch.randn(size),
        "Draws.noised": lambda: Draws().noised(total, 3.7),
        "Draws.normal": lambda: Draws().normal((size,), like=total),
        "four torch.randn": lambda: total + sum((3.7 / 2) * torch.randn(size) for _ in range(4)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(s) for name, s in seconds.items()}


def main() -> None:
    """Print the p-values and the speed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numbers", type=int, default=10**8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = tally(own, options.numbers)
    for name, p in found.items():
        print(f"{name:24} p = {p:.4g}")
    for deviation in (1.0, 3.7):
        p = grid_p(options.numbers, deviation)
        found[f"grid at {deviation}"] = p
        print(f"{f'grid at deviation {deviation}':24} p = {p:.4g}")
    print(f"{len(found)} tests of {options.numbers:.3g} numbers, together p = {verdict(found):.3g}")
    for size in (10**4, 10**6, 10**7):
        seconds = speed(options.rounds, size)
        base = seconds["torch.randn"]
        print(f"{size} float32 values, CPU time, {torch.get_num_threads()} thread(s):")
        for name, s in seconds.items():
            print(f"    {name:18} {1e9 * s / size:6.1f} ns each, {s / base:5.2f} of torch.randn")


if __name__ == "__main__":
    main()
