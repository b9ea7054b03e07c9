"""Search the seed of an update's noise, subtract the noise, and attack what is left.

    python benchmarks/seed_search.py                      # 65,536 seeds around the planted one
    python benchmarks/seed_search.py --range 4294967296   # all of them, minutes on one core

A `torch.Generator` on a CPU starts from 32 bits of its seed. Whoever saves one update with noise
from it, and knows the public model and the settings, can try them all. What identifies the seed:
the clipped sum of a batch has a norm of at most batch * clip, so over the first tensor's sixteen
values the release over its deviation is within batch / noise of the right seed's numbers. Wrong
seeds are about sqrt(32) away. Candidates are then tried on the whole update.

Two updates are searched: one whose noise this script draws from a `torch.Generator`, in the order
of the parameters, and one that `guard.update` makes. Prints the seeds that were found, ns a seed,
and the PSNR of `position-robust` on the update as it is and without the noise that was found.
Needs a C compiler named cc.
"""

from __future__ import annotations

import argparse
import copy
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitguard import data
from vitguard.attacks.robust import RobustPosition
from vitguard.core import Batch, Update
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.guard import Guard, protect
from vitguard.metrics import psnr
from vitguard.models import build_model, normalization_of
from vitguard.threats import CuriousServer

MODEL = "vit_tiny_patch16_224:img_size=32,patch_size=8,depth=2,num_classes=10,global_pool=avg"
SEEDS = 2**32
BLOCK = 16
LARGEST = 2.0
"""Distance over sixteen values up to which a seed is tried on the whole update."""
SOURCE = Path(__file__).with_suffix(".c")


@dataclass(frozen=True)
class Search:
    """What a search came to: seeds whose noise the update holds, and its cost."""

    seeds: tuple[int, ...]
    tried: int
    seconds: float


def compiled(folder: Path) -> Path:
    """Compile the search into `folder` and return the program."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("Expected a C compiler named cc, got none. Install gcc or clang.")
    program = folder / "seed_search"
    command = [compiler, "-O3", "-march=native", "-o", str(program), str(SOURCE), "-lm"]
    subprocess.run(command, check=True)
    return program


def planted(
    sums: Mapping[str, Tensor], deviation: float, size: int, seed: int
) -> dict[str, Tensor]:
    """Return noisy means of `sums` with noise from one `torch.Generator`, tensor by tensor."""
    noise = noise_of(sums, seed)
    return {k: (s + deviation * noise[k]) / size for k, s in sums.items()}


def noise_of(like: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return what a `torch.Generator` with this seed draws for tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(t.shape, generator=generator) for k, t in like.items()}


def search(
    program: Path,
    released: Mapping[str, Tensor],
    deviation: float,
    size: int,
    *,
    norm: float,
    start: int = 0,
    count: int = SEEDS,
    skip: int = 0,
) -> Search:
    """Return the seeds from `start` on whose noise explains a released mean.

    Args:
        program: From `compiled`.
        released: The update's tensors in the order they were noised, float32; the first one has a
            multiple of sixteen values.
        deviation: Standard deviation of the noise on the sum.
        size: Number of examples in the mean.
        norm: Bound on the norm of the sum without noise.
        skip: 32-bit outputs that the generator gave before the first tensor.
    """
    whole = {k: t * (size / deviation) for k, t in released.items()}
    first = next(iter(whole.values())).flatten()
    if len(first) % BLOCK:
        raise SystemExit(f"Expected a first tensor of 16 k values, got {len(first)}.")
    numbers = [repr(float(x)) for x in first[:BLOCK]]
    near = min(norm / deviation, LARGEST)
    started = time.perf_counter()
    command = [str(program), str(start), str(count), str(skip), repr(near), *numbers]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - started
    candidates = [int(line.split()[0]) for line in found.splitlines()]
    return Search(tuple(s for s in candidates if _explains(whole, s, skip)), count, seconds)


def _explains(whole: Mapping[str, Tensor], seed: int, skip: int) -> bool:
    """Whether the numbers of a seed are much nearer to a scaled update than independent ones."""
    generator = torch.Generator().manual_seed(seed)
    if skip:
        torch.rand(skip, generator=generator)  # one 32-bit output each
    left = [t - torch.randn(t.shape, generator=generator) for t in whole.values()]
    squares = sum(float(t.double().square().sum()) for t in left)
    return squares < sum(t.numel() for t in left)  # twice as much where they are independent


def subtract(update: Update, deviation: float, seed: int) -> Update:
    """Return the update without the noise of a seed."""
    noise = noise_of(update.tensors, seed)
    size = update.batch_size
    tensors = {k: t - deviation * noise[k] / size for k, t in update.tensors.items()}
    return replace(update, tensors=tensors)


def decibels(model: nn.Module, update: Update, pixels: Tensor, defense: Any) -> float:
    """Return the PSNR of `position-robust` on an update of one photo, under these settings."""
    guard = protect(copy.deepcopy(model).train(), [defense])
    view = CuriousServer().view(guard, update, normalization_of(model))
    guess = RobustPosition().run(view, torch.Generator().manual_seed(0))
    return float(psnr(guess.images, pixels)[0])


def seed_inside(guard: Guard) -> int | None:
    """Return the 32 bits that a guard's generator started from; None where there is none."""
    draws = guard._draws
    generator = getattr(draws, "generator", None) or getattr(draws, "seeded", None)
    return None if generator is None else generator.initial_seed() % SEEDS


def main() -> None:
    """Search two updates and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--range", type=int, default=2**16, help="seeds to try, at most 2^32")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--epsilon", type=float, default=1.0)
    options = parser.parse_args()
    model = build_model(options.model).train()
    guard = protect(copy.deepcopy(model), [DifferentialPrivacy(epsilon=options.epsilon)])
    defense: Any = guard.defenses[0]
    image = data.sample_images(guard.anatomy.image_size, count=1)
    labels = torch.tensor([0])
    inputs = normalization_of(model).apply(image.pixels)
    deviation = defense.multiplier(1.0, 1) * defense.clip
    print(f"epsilon {options.epsilon:g}, delta {defense.delta:g}: noise multiplier {deviation:.3f}")

    seed = secrets.randbits(63)
    with guard.rehearsing():
        sums = defense.clipped_sum(
            guard.model, torch.nn.functional.cross_entropy, Batch(inputs, labels)
        )
    theirs = Update(tensors=planted(sums, deviation, 1, seed), batch_size=1)
    cases = [
        ("noise of a torch.Generator", theirs, seed % SEEDS),
        ("guard.update", guard.update(inputs, labels), seed_inside(guard)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(Path(folder))
        for name, update, truth in cases:
            count = min(options.range, SEEDS)
            start = 0 if truth is None else min(max(truth - count // 2, 0), SEEDS - count)
            found = search(
                program, update.tensors, deviation, 1, norm=defense.clip, start=start, count=count
            )
            pace = 1e9 * found.seconds / found.tried
            print(f"{name}: {found.tried} seeds in {found.seconds:.1f} s ({pace:.1f} ns each)")
            before = decibels(model, update, image.pixels, defense)
            print(f"    position-robust on the update as it is: {before:.1f} dB")
            if not found.seeds:
                print("    no seed fits")
            for s in found.seeds:
                clean = subtract(update, deviation, s)
                after = decibels(model, clean, image.pixels, DifferentialPrivacy(noise=0.0))
                print(f"    seed {s} fits: {after:.1f} dB without its noise")


if __name__ == "__main__":
    main()
