"""How often a guess without information is called a leak.

Each trial takes a CIFAR-10 test image as the truth, makes a guess that no update was needed for,
and judges it as an audit would: by the gain above the luckiest guess without information, and by
the identification among a thousand decoys, of which two hits in two images make a leak. A rate of
leaks above one in a hundred is a defect, and so is one of picked out above 1 / (EQUALS + 1).

    VITGUARD_DATA=... python benchmarks/false_leaks.py --trials 2000
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vitguard.audit.scale import Scale, decoys_for, line_up
from vitguard.metrics import identification, patch_psnr
from vitguard.report.finding import LEAK_GAIN

PATCH = (4, 4)


def images(count: int = 9500) -> tuple[Tensor, Tensor]:
    """Return CIFAR-10 test images, pixels in [0, 1], and their classes."""
    with np.load(Path(os.environ["VITGUARD_DATA"]) / "cifar10.npz") as held:
        packed, ends, labels = (held[f"test_{part}"] for part in ("jpeg", "off", "y"))
    files = (packed[ends[i] : ends[i + 1]].tobytes() for i in range(min(count, len(labels))))
    pictures = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.from_numpy(labels[: len(pixels)].astype(np.int64))


def smooth(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return noise whose spectrum falls with frequency as that of photos does."""
    down = torch.fft.fftfreq(shape[2])[:, None].square() + torch.fft.rfftfreq(shape[3]).square()
    down[0, 0] = 1.0
    waves = torch.fft.rfft2(torch.randn(shape, generator=generator))
    waves[..., 0, 0] = 0
    made = torch.fft.irfft2(waves / down.sqrt(), s=shape[2:])
    return (0.5 + 0.25 * made / made.std((1, 2, 3), keepdim=True)).clamp(0, 1)


def kinds(
    pixels: Tensor, labels: Tensor, mean: Tensor, generator: torch.Generator
) -> dict[str, Callable[[int], Tensor]]:
    """Return what makes the guess of each trial."""

    def other(i: int) -> Tensor:
        away = torch.nonzero(labels != labels[i]).flatten()
        return pixels[away[torch.randint(len(away), (1,), generator=generator)]]

    def flat(image: Tensor) -> Tensor:
        return image.mean((2, 3), keepdim=True).expand_as(image)

    return {
        "flat, colour of another image": lambda i: flat(other(i)),
        "flat, its own colour": lambda i: flat(pixels[i : i + 1]),
        "another image, blurred": lambda i: F.avg_pool2d(
            other(i), 7, stride=1, padding=3, count_include_pad=False
        ),
        "smooth noise": lambda i: smooth((1, *pixels.shape[1:]), generator),
        "mean image": lambda i: mean,
        "image of another class": other,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="False leaks")
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    pixels, labels = images()
    mean = pixels[5000:].mean(0, keepdim=True)
    chosen = torch.randperm(5000, generator=generator)[: options.trials].tolist()
    decoys = decoys_for(pixels[:1], options.seed)
    makers = kinds(pixels, labels, mean, generator)
    gained, told, gains = (dict.fromkeys(makers, 0.0) for _ in range(3))
    for i in chosen:
        truth = pixels[i : i + 1]
        scale = Scale.of(truth, PATCH, decoys, options.seed)
        for kind, make in makers.items():
            guess = make(i)
            gain = float(patch_psnr(guess, truth, PATCH) - scale.baseline.patch_psnr)
            gains[kind] = max(gains[kind], gain)
            gained[kind] += gain >= LEAK_GAIN
            hit = identification(line_up(guess), line_up(truth), decoys, scale.uninformed)
            told[kind] += bool(hit[0])
    print(f"{len(chosen)} trials a kind, {len(decoys)} decoys")
    for kind in makers:
        rate = told[kind] / len(chosen)
        # an audit of one image: its gain alone leaks; of two: both are told from the decoys
        print(
            f"{kind:30s} leaks by gain {gained[kind] / len(chosen):7.2%} (largest "
            f"{gains[kind]:+.1f} dB), picked out {rate:7.2%}, two of two {rate * rate:8.3%}"
        )


if __name__ == "__main__":
    main()
