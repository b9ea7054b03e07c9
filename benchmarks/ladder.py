"""What the exact attacks reach: one row per case, with floors, verified share and seconds.

    python benchmarks/ladder.py [--seconds S] [--only WORD ...] [--images DIR]

PSNR is the worst image of the batch. `floor` is the best flat image in a public colour, and under
matching the thumbnail (`vitguard.metrics.baseline`). Rows on CIFAR need the weights and images in
the folder that VITGUARD_DATA names. ViT-B rows have random weights with every norm and bias moved.
Under a shuffle the mask is inferred from the update, or known: with learnable positions the rows of
shuffled positions are zero. `matched` and `>= 100 dB` do not count the order of the patches.
`unrounded` is the worst image before the adversary's last step, which may round pixels to those of
image files. Photos are the sample photos of scikit-image. `CPU s` is the process's own time, which
is what to compare on a machine that is shared. Damaged gradients: benchmarks/damage.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitguard import data
from vitguard.attacks.budget import Budget
from vitguard.attacks.ladder import Ladder
from vitguard.attacks.ladder import attack as rungs
from vitguard.core import Guess, Normalization, View
from vitguard.guard import protect
from vitguard.metrics import baseline, best_assignment, patch_psnr, psnr
from vitguard.models import build_model, load_checkpoint
from vitguard.registry import parse_stack
from vitguard.threats import CuriousServer
from vitguard.vit import Anatomy

CIFAR_VIT = "img_size={size},patch_size=4,embed_dim=128,depth=4,num_heads=4,mlp_ratio=2"
CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
PLAIN = Normalization()
FROZEN = "positions:kind=frozen"


@dataclass(frozen=True)
class Case:
    """One row: a model, a batch and a stack of defenses."""

    name: str
    model: Callable[[], nn.Module]
    images: Callable[[], tuple[Tensor, Tensor]]
    defenses: str = FROZEN
    normalization: Normalization = PLAIN
    double: bool = False


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}", flush=True)
    heads = (
        "case, rung, unrounded dB, raw dB [floor], matched dB [floor], verified, >= 100 dB, "
        "seconds, CPU s"
    )
    print(f"| {heads.replace(', ', ' | ')} |\n{'|---' * 9}|", flush=True)
    for case in cases():
        if not options.only or any(word in case.name for word in options.only):
            print(row(case, options.seconds, options.images), flush=True)


def cases() -> Iterator[Case]:
    """Yield all rows; those on CIFAR only where its data is."""
    for batch in (1, 2, 3, 4):
        yield Case(f"ViT-B/32 depth 3, B={batch}", lambda: vit_base(32, 3), photos(batch))
    for first in (1, 2, 3):
        name = f"ViT-B/32 depth 3, B=2, photos {first + 1} and {first + 2}"
        yield Case(name, lambda: vit_base(32, 3), photos(2, first))
    yield Case("ViT-B/32 depth 12, B=2", lambda: vit_base(32, 12), photos(2))
    for batch in (1, 2):
        yield Case(f"ViT-B/16 depth 3, B={batch}", lambda: vit_base(16, 3), photos(batch))
    for index in range(3):
        name = f"ViT-B/16 depth 3, B=1, photo {index + 2}"
        yield Case(name, lambda: vit_base(16, 3), photos(1, index + 1))
    for index in range(3):
        name = f"d=384 depth 3 32 px, sine-cosine, B=1, photo {index + 1}"
        yield Case(name, narrow, photos(1, index, size=32), "positions:kind=sincos")
    yield Case("d=384 depth 3 32 px, sine-cosine, B=1, float64", narrow, photos(1, size=32),
               "positions:kind=sincos", double=True)  # fmt: skip
    for batch in (1, 2):
        yield Case(f"d=384 depth 3 32 px, average pooling, B={batch}", averaging,
                   photos(batch, size=32))  # fmt: skip
    if not os.environ.get("VITGUARD_DATA"):
        return
    for batch in (1, 2, 4):
        yield cifar_case(f"trained d=128 32 px, B={batch}", 32, batch)
    for batch in (2, 3):
        yield cifar_case(f"trained d=128 crop 16, B={batch}", 16, batch)
    for ratio in (0.05, 0.3, 0.7, 0.9):
        stack = f"{FROZEN}+shuffle:ratio={ratio},mask=uniform"
        yield cifar_case(f"trained d=128 32 px, shuffle {ratio}", 32, 1, stack)
        stack = f"shuffle:ratio={ratio},mask=uniform"
        yield cifar_case(f"trained d=128 32 px, shuffle {ratio}, mask known", 32, 1, stack)
    yield cifar_case("trained d=128 32 px, sine-cosine", 32, 1, "positions:kind=sincos")


def cifar_case(name: str, size: int, batch: int, defenses: str = FROZEN) -> Case:
    """Return a row on the ViT that others trained on CIFAR-10."""
    return Case(name, lambda: cifar_vit(size), cifar_images(size, batch), defenses, CIFAR)


def row(case: Case, seconds: float, folder: Path | None) -> str:
    """Run one case and return its line."""
    model, (pixels, labels) = case.model(), case.images()
    if case.double:
        model, pixels = model.double(), pixels.double()
    view, shuffled = observe(model, pixels, labels, case)
    anatomy = Anatomy.of(view.model)
    guess, rough, (spent, worked) = climb(view, seconds)
    made = matched(guess.images.cpu(), pixels)
    floor = baseline(pixels, anatomy.patch_size)
    raw, moved = psnr(made, pixels), patch_psnr(made, pixels, anatomy.patch_size)
    if folder is not None and case.name in PICTURES:
        save_picture(folder / PICTURES[case.name], pixels, made)
    sharp = patches_above(anatomy, made, pixels, shuffled, 100.0)
    return (
        f"| {case.name} | {guess.details['rung']} | "
        f"{float(psnr(matched(rough.images.cpu(), pixels), pixels).min()):.1f} | "
        f"{float(raw.min()):.1f} "
        f"[{float(floor.psnr.min()):.1f}] | {float(moved.min()):.1f} "
        f"[{float(floor.thumbnail.min()):.1f}] | {100 * guess.details['verified']:.0f} % | "
        f"{sharp} | {spent:.1f} | {worked:.1f} |"
    )


def climb(view: View, seconds: float) -> tuple[Guess, Guess, tuple[float, float]]:
    """Return the ladder's guess, the one before rounding, and seconds by both clocks."""
    given: list[Any] = []
    final = rungs.polish

    def keeping(*arguments: Any, levels: int | None) -> Guess:
        given.extend(arguments)
        return final(*arguments, levels=levels)

    rungs.polish = keeping
    started, worked = time.perf_counter(), time.process_time()
    try:
        guess = Ladder(seconds=seconds).run(view, torch.Generator().manual_seed(0))
    finally:
        rungs.polish = final
    spent = time.perf_counter() - started, time.process_time() - worked
    if "rounded" not in guess.details.get("polish", ""):
        return guess, guess, spent
    return (
        guess,
        final(given[0], given[1], given[2], Budget.of(seconds), levels=None),
        spent,
    )


PICTURES = {
    "ViT-B/32 depth 3, B=2": "ladder-batch.png",
    "ViT-B/32 depth 3, B=3": "ladder-batch-3.png",
}


def matched(images: Tensor, truth: Tensor) -> Tensor:
    """Return for each true image the guess that stands for it."""
    quality = torch.stack([psnr(images, t[None].expand_as(images)) for t in truth], 1)
    return images[best_assignment(quality)]


def patches_above(
    anatomy: Anatomy, made: Tensor, truth: Tensor, shuffled: Tensor | None, decibels: float
) -> str:
    """Count patches above a PSNR: in place, and where shuffled under the best match."""
    one, other = (anatomy.patchify(i.double()).flatten(0, 1) for i in (made, truth))
    limit = 10 ** (-decibels / 10)
    if shuffled is None:
        good = ((one - other).square().mean(1) <= limit).sum()
        return f"{int(good)} of {len(one)}"
    where = shuffled.flatten()
    gap = torch.cdist(other[where], one[where]).square() / one.shape[1]
    good = (gap.amin(1) <= limit).sum()
    return f"{int(good)} of {int(where.sum())} shuffled"


def observe(
    model: nn.Module, pixels: Tensor, labels: Tensor, case: Case
) -> tuple[View, Tensor | None]:
    """Return what a curious server sees, and the mask the victim drew."""
    generator = torch.Generator().manual_seed(1)
    guard = protect(model.train(), parse_stack(case.defenses), generator=generator)
    update = guard.update(case.normalization.apply(pixels), labels)
    shuffled = guard.truth().get("shuffled")
    view = CuriousServer(()).view(guard, update, case.normalization)
    return view, None if shuffled is None else shuffled.bool()


def vit_base(patch: int, depth: int) -> nn.Module:
    """Return a ViT-B with random weights, norms and biases moved away from one and zero."""
    return moved(build_model(f"vit_base_patch{patch}_224:depth={depth}"))


def narrow() -> nn.Module:
    """Return a random ViT of width 384 with 64 tokens."""
    sizes = "img_size=32,patch_size=4,embed_dim=384,depth=3,num_heads=6,num_classes=10"
    return moved(build_model(f"vit_tiny_patch16_224:{sizes}"))


def averaging() -> nn.Module:
    """Return the same without a class token, its tokens averaged."""
    sizes = "img_size=32,patch_size=4,embed_dim=384,depth=3,num_heads=6,num_classes=10"
    return moved(build_model(f"vit_tiny_patch16_224:{sizes},global_pool=avg,class_token=false"))


def moved(model: nn.Module) -> nn.Module:
    """Add 0.1 N(0, 1) to norms and biases."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def cifar_vit(size: int) -> nn.Module:
    """Return the trained CIFAR ViT, positions resampled for smaller crops."""
    model: Any = build_model(f"vit_tiny_patch16_224:{CIFAR_VIT.format(size=32)},num_classes=10")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    load_checkpoint(model, Path(os.environ["VITGUARD_DATA"]) / "weights/cifar10_vit_a.safetensors")
    if size != 32:
        model.set_input_size(img_size=size)
    return model


def photos(batch: int, first: int = 0, size: int = 224) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return sample photos and labels 0, 1, 2 ..."""
    return lambda: (
        data.sample_images((size, size), count=first + batch).pixels[first:],
        torch.arange(batch),
    )


def cifar_images(size: int, batch: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return the first CIFAR-10 test images, cropped in the middle."""

    def load() -> tuple[Tensor, Tensor]:
        folder = os.environ["VITGUARD_DATA"]
        sys.path.insert(0, folder)
        from load import cifar10  # type: ignore[import-not-found]

        images, labels = cifar10("test", batch)
        pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
        edge = (32 - size) // 2
        return pixels[:, :, edge : edge + size, edge : edge + size], torch.as_tensor(labels)

    return load


def save_picture(path: Path, truth: Tensor, made: Tensor) -> None:
    """Write originals over reconstructions."""
    from PIL import Image

    rows = [torch.cat(list(images), 2) for images in (truth, made)]
    grid = torch.cat(rows, 1).permute(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((grid * 255).round().byte().numpy()).save(path)


if __name__ == "__main__":
    main()
