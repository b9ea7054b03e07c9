"""Looks for a patch shuffle that withstands the exact attacks; docs/shuffle.md has what came out.

    python benchmarks/shuffle_variants.py --data DATA [--only sincos mixing withheld batches damage]

DATA holds `cifar10.npz` and `weights/cifar10_vit_a.safetensors` (VITGUARD_DATA by default). Each
row is one stack of defenses on a trained CIFAR-10 ViT (width 128, depth 4, 64 patches): the best
flat image and flat patches of each test image (what a guess without information reaches), then
each attack's dB of the image as it is, of its content (patches matched), verdict, and the share of
patches it proved. One to six minutes a group on one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitguard as vg
from vitguard.attacks.gelu_span import GeluSpan
from vitguard.attacks.span import SpanInversion
from vitguard.errors import VitguardError
from vitguard.guard import protect
from vitguard.metrics import baseline, score
from vitguard.models import build_model, load_checkpoint
from vitguard.registry import parse_stack
from vitguard.threats import CuriousServer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_cifar10

NORMALIZATION = train_cifar10.NORMALIZATION
MODEL = "vit_tiny_patch16_224:patch_size=4,embed_dim=128,depth=4,num_heads=4,mlp_ratio=2"
FROZEN, SINCOS, SHUFFLE = "positions:kind=frozen", "positions:kind=sincos", "shuffle:ratio=0.7"


def trained(data: Path, size: int = 32) -> nn.Module:
    """Return the trained ViT; for smaller images with the positions of the top left corner."""
    whole, small = (build_model(f"{MODEL},num_classes=10,img_size={s}") for s in (32, size))
    load_checkpoint(whole, data / "weights" / "cifar10_vit_a.safetensors")
    state = whole.state_dict()
    rows = state["pos_embed"][:, 1:].unflatten(1, (8, 8))[:, : size // 4, : size // 4]
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], rows.flatten(1, 2)], 1)
    small.load_state_dict(state)
    for module in small.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5  # as it was trained
    return small


def images_of(data: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Return the first images of a split, pixels in [0, 1], and their classes."""
    found = train_cifar10.load_data(str(data), images=count, image_size=32)
    pixels, labels = (found.train if split == "train" else found.test)[:count]
    return pixels.float() / 255, labels


def audited(
    model: nn.Module, pixels: Tensor, labels: Tensor, stack: str, attacks: Sequence[str], batch: int
) -> str:
    """Return what an audit says about one stack."""
    report = vg.audit(
        model, (pixels, labels), defenses=parse_stack(stack), attacks=list(attacks),
        batch_size=batch, normalization=NORMALIZATION,
    )  # fmt: skip
    cells = []
    for finding in report.findings:
        if finding.defense == "none" and stack != "none":
            continue
        cell = f"{finding.attack}: {finding.verdict}"
        if finding.psnr is not None and finding.patch_psnr is not None:
            cell += f", image {_list(finding.psnr.per_image)}"
            cell += f", content {_list(finding.patch_psnr.per_image)}"
        if proved := finding.details.get("verified"):
            cell += f", {100 * proved:.0f} % proved"
        cells.append(cell)
    floor = baseline(pixels, (4, 4))
    floors = f"flat {_list(floor.psnr)}, flat patches {_list(floor.thumbnail)}"
    return " | ".join([floors, *cells])


def sincos(data: Path) -> None:
    """Positions in which the linear equations leave a space open, and a shuffle."""
    pixels, labels = images_of(data, "test", 2)
    for stack in (SINCOS, f"{SINCOS}+shuffle:ratio=0.3", f"{SINCOS}+{SHUFFLE}"):
        row = audited(trained(data), pixels, labels, stack, ["gelu-span:seconds=60"], 1)
        print(f"sincos | {stack} | {row}", flush=True)


def mixing(data: Path) -> None:
    """Two images exchange half of their patches, each at its own place; labels stay as they are."""
    for size, batch in ((32, 1), (16, 2)):
        pixels, labels = images_of(data, "test", 2)
        pixels = pixels[..., 8 : 8 + size, 8 : 8 + size] if size < 32 else pixels
        side = size // 4
        other = torch.randperm(side**2, generator=torch.Generator().manual_seed(0)) % 2 == 1
        other = other.view(side, side).repeat_interleave(4, 0).repeat_interleave(4, 1)
        mixed = torch.where(other, pixels, pixels.flip(0))
        for name, shown in (("apart", pixels), ("mixed", mixed)):
            for stack in (FROZEN, f"{FROZEN}+{SHUFFLE}"):
                attacks = ["span", "gelu-span:seconds=40"]
                row = audited(trained(data, size), shown, labels, stack, attacks, batch)
                print(f"mixing | {size} px, B={batch}, {name}, {stack} | {row}", flush=True)


def withheld(data: Path) -> None:
    """Positions that stay with the client, after so many of its steps, and a shuffle.

    The attacker knows the positions that were sent out at the start.
    """
    pixels, labels = images_of(data, "test", 2)
    others, classes = images_of(data, "train", 1024)
    for steps in (0, 10, 100):
        for stack in ("withheld", f"withheld+{SHUFFLE}"):
            model = trained(data).train()
            guard = protect(model, parse_stack(stack), generator=torch.Generator().manual_seed(1))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for step in range(steps):
                part = slice(64 * step % 1024, 64 * step % 1024 + 64)
                optimizer.zero_grad()
                F.cross_entropy(model(NORMALIZATION.apply(others[part])), classes[part]).backward()
                optimizer.step()
            optimizer.zero_grad()
            for one, label in zip(pixels.split(1), labels.split(1), strict=True):
                update = guard.update(NORMALIZATION.apply(one), label)
                view = CuriousServer().view(guard, update, NORMALIZATION)
                cells = []
                for attack in (SpanInversion(), GeluSpan(seconds=30)):
                    try:
                        guess = attack.run(view, torch.Generator().manual_seed(0))
                        got = score(guess.images, one, (4, 4))
                        cell = f"image {float(got.psnr):.1f}, content {float(got.patch_psnr):.1f}"
                    except VitguardError as error:
                        cell = str(error)
                    cells.append(f"{attack.name}: {cell}")
                floor = f"flat patches {_list(baseline(one, (4, 4)).thumbnail)}"
                print(" | ".join([f"withheld | {steps} steps, {stack}", floor, *cells]), flush=True)


def batches(data: Path) -> None:
    """As many tokens as dimensions or more, with a shuffle or without."""
    pixels, labels = images_of(data, "test", 4)
    for batch in (2, 4):
        for stack in ("none", SHUFFLE, SINCOS, f"{SINCOS}+{SHUFFLE}", f"{FROZEN}+{SHUFFLE}"):
            row = audited(trained(data), pixels, labels, stack, ["ladder:seconds=40"], batch)
            print(f"batches | B={batch}, {stack} | {row}", flush=True)


def damage(data: Path) -> None:
    """A shuffle together with noise or pruning, against the attacks that are made for those."""
    pixels, labels = images_of(data, "test", 2)
    for positions in ("", f"{FROZEN}+"):
        for shuffle in ("", "shuffle:ratio=0.3+", f"{SHUFFLE}+"):
            for last in ("noise:scale=0.001", "noise:scale=0.01", "pruning:keep=0.1"):
                stack = positions + shuffle + last
                attacks = ["position-robust", "span-robust"]
                row = audited(trained(data), pixels, labels, stack, attacks, 1)
                print(f"damage | {stack} | {row}", flush=True)


def _list(values: Sequence[float] | Tensor) -> str:
    return " ".join(f"{float(v):.1f}" for v in values)


def main() -> None:
    """Run the groups of rows that were asked for."""
    groups = {f.__name__: f for f in (sincos, mixing, withheld, batches, damage)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("VITGUARD_DATA"))
    parser.add_argument("--only", nargs="+", choices=groups, default=list(groups))
    options = parser.parse_args()
    if options.data is None:
        raise SystemExit("Give --data, or set VITGUARD_DATA.")
    for name in options.only:
        groups[name](options.data)


if __name__ == "__main__":
    main()
