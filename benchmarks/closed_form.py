"""Seconds and PSNR of the closed-form attacks per model, beside one forward and backward pass.

    python benchmarks/closed_form.py [--photos K] [--models NAME ...]

Prints, per model and attack, the median and worst PSNR over the sample photos at batch size 1, the
median seconds of the attack, and their ratio to one plain forward + backward of the same model in
the same run, interleaved.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F

from vitguard import data
from vitguard.attacks.position import PositionInversion
from vitguard.attacks.span import SpanInversion
from vitguard.defenses.positions import FixedPositions
from vitguard.errors import NotApplicable
from vitguard.guard import protect
from vitguard.metrics import psnr
from vitguard.models import build_model, normalization_of
from vitguard.threats import CuriousServer
from vitguard.vit import Anatomy

MODELS = ("vit_base_patch16_224", "vit_base_patch32_224", "vit_small_patch16_224")
CASES = (
    ("position", PositionInversion(), (), ()),
    ("span, frozen positions", SpanInversion(), (FixedPositions("frozen"),), ()),
    (
        "span, qkv withheld",
        SpanInversion(),
        (FixedPositions("frozen"),),
        (r"blocks\.0\.attn\.qkv",),
    ),
    ("span, sincos positions", SpanInversion(), (FixedPositions("sincos"),), ()),
)


def main() -> None:
    """Measure every model and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    options = parser.parse_args()
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}")
    print(
        f"{'model':24} {'attack':24} {'median dB':>9} {'worst dB':>9} {'seconds':>8} {'/ step':>7}"
    )
    for name in options.models:
        model = build_model(name)
        for label, *figures in measure(model, options.photos):
            decibels, seconds, step = figures
            if not decibels:
                print(f"{name:24} {label:24} not applicable")
                continue
            ratio = statistics.median(s / t for s, t in zip(seconds, step, strict=True))
            print(
                f"{name:24} {label:24} {statistics.median(decibels):9.1f} {min(decibels):9.1f} "
                f"{statistics.median(seconds):8.2f} {ratio:7.2f}"
            )


def measure(model: torch.nn.Module, photos: int):
    """Yield (label, PSNRs, attack seconds, step seconds) per case; the step beside each attack."""
    anatomy, normalization = Anatomy.of(model), normalization_of(model)
    images = data.sample_images(anatomy.image_size, count=photos)
    for label, attack, stack, withhold in CASES:
        guard = protect(copy.deepcopy(model).train(), stack)
        decibels, seconds, steps = [], [], []
        for i, pixels in enumerate(images.pixels):
            inputs, target = normalization.apply(pixels)[None], torch.tensor([i])
            started = time.perf_counter()
            F.cross_entropy(guard.model(inputs), target).backward()
            steps.append(time.perf_counter() - started)
            guard.model.zero_grad()
            view = CuriousServer(withhold).view(guard, guard.update(inputs, target), normalization)
            started = time.perf_counter()
            try:
                guess = attack.run(view, torch.Generator().manual_seed(0))
            except NotApplicable:
                continue
            seconds.append(time.perf_counter() - started)
            decibels.append(float(psnr(guess.images, pixels[None])[0]))
        yield label, decibels, seconds, steps


if __name__ == "__main__":
    main()
