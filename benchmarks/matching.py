"""Gradient matching: time and quality against breaching, and the table over batches and models.

    python benchmarks/matching.py speed --peer PATH [--peer PATH ...] [--threads N]
    python benchmarks/matching.py parameters
    python benchmarks/matching.py table --data FOLDER [--attacks ...] [--batches 1 2 4 8]

`speed` runs both attackers on the same model, photo, iterations and threads, turn by turn. The peer
(https://github.com/JonasGeiping/breaching) and what it imports (hydra-core, omegaconf, lpips) are
installed beside this project and found in the folders given with `--peer`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F

from vitguard import metrics
from vitguard.attacks.inverting import InvertingGradients
from vitguard.core import Guess, Normalization, View
from vitguard.data import sample_images
from vitguard.guard import protect
from vitguard.registry import attack_types, parse_attack, parse_stack
from vitguard.threats import CuriousServer

NORMALIZATION = Normalization()
clock = time.perf_counter
LABEL = torch.tensor([3])


def small_model() -> torch.nn.Module:
    """The randomly initialised 32x32/4 ViT, width 192, depth 4."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=192, depth=4, num_heads=3,
        num_classes=10,
    )  # fmt: skip


def tiny_model() -> torch.nn.Module:
    """The randomly initialised vit_tiny_patch16_224."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224")


def view_of(model: torch.nn.Module, pixels: torch.Tensor) -> View:
    """What a curious server sees of one undefended image."""
    guard = protect(model.train(), [])
    update = guard.update(NORMALIZATION.apply(pixels), LABEL)
    view = CuriousServer().view(guard, update, NORMALIZATION)
    guard.remove()
    return view


def forward_backward(model: torch.nn.Module, pixels: torch.Tensor, repeat: int) -> float:
    """Median seconds of one plain forward and backward of the same model and image."""
    model.eval()
    images, parameters = NORMALIZATION.apply(pixels), list(model.parameters())
    times = []
    for _ in range(repeat + 2):
        began = clock()
        torch.autograd.grad(F.cross_entropy(model(images), LABEL), parameters)
        times.append(clock() - began)
    return statistics.median(times[2:])


def ours(
    model: torch.nn.Module, pixels: torch.Tensor, iterations: int, *, fast: bool = False
) -> tuple[float, Any]:
    """Seconds per iteration and the images of `inverting`, the paper's settings or `fast`."""
    view = view_of(model, pixels)
    preset = InvertingGradients.fast if fast else InvertingGradients
    attack = preset(iterations=iterations)
    began = clock()
    guess = attack.run(view, torch.Generator().manual_seed(0))
    return (clock() - began) / iterations, guess.images


def theirs(model: torch.nn.Module, pixels: torch.Tensor, iterations: int) -> tuple[float, Any]:
    """Seconds per iteration and the images of breaching's `invertinggradients`."""
    import breaching  # type: ignore[import-not-found]
    from breaching.attacks import prepare_attack  # type: ignore[import-not-found]

    model = model.eval()
    for module in model.modules():  # its double backward needs the plain attention
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    images = NORMALIZATION.apply(pixels)
    gradient = torch.autograd.grad(F.cross_entropy(model(images), LABEL), list(model.parameters()))
    facts = types.SimpleNamespace(
        shape=list(pixels.shape[1:]), mean=[0.5] * 3, std=[0.5] * 3, modality="vision",
        classes=10, task="classification", name="photo",
    )  # fmt: skip
    config = breaching.get_attack_config("invertinggradients")
    config.optim.max_iterations = iterations
    server = {
        "metadata": facts,
        "parameters": [p.detach() for p in model.parameters()],
        "buffers": list(model.buffers()),
    }
    shared = {
        "gradients": list(gradient),
        "buffers": None,
        "metadata": {
            "num_data_points": 1, "labels": LABEL, "local_hyperparams": None, "data_key": "inputs",
        },
    }  # fmt: skip
    attacker = prepare_attack(model, torch.nn.CrossEntropyLoss(), config)
    torch.manual_seed(0)
    began = clock()
    result, _ = attacker.reconstruct([server], [shared], {})
    seconds = (clock() - began) / iterations
    return seconds, NORMALIZATION.invert(result["data"]).clamp(0, 1).detach()


def speed(options: argparse.Namespace) -> None:
    """Both attackers, turn by turn, on both models."""
    sys.path[:0] = options.peer
    warnings.simplefilter("ignore")
    runners: list[tuple[str, Callable[..., tuple[float, Any]]]] = [
        ("vitguard", ours),
        ("vitguard fast", functools.partial(ours, fast=True)),
    ]
    if options.peer:
        import logging

        logging.disable(logging.CRITICAL)
        runners.append(("breaching", theirs))
    print(f"{options.threads} threads, photo {options.photo}")
    for name, make, iterations, repeat in (
        ("32x32/4 d=192 depth 4", small_model, options.iterations, 30),
        ("vit_tiny_patch16_224", tiny_model, max(4, options.iterations // 10), 6),
    ):
        pixels = photo(options.photo, make())
        unit = forward_backward(make(), pixels, repeat)
        patch = (4, 4) if pixels.shape[-1] == 32 else (16, 16)
        floor = metrics.baseline(pixels, patch)
        print(f"\n{name}: {iterations} iterations, forward+backward {1e3 * unit:.1f} ms, "
              f"floor {float(floor.psnr):.1f} raw "
              f"{float(floor.patch_psnr):.1f} matched")  # fmt: skip
        seconds: dict[str, list[float]] = {}
        quality: dict[str, tuple[float, float]] = {}
        for _ in range(options.rounds):
            for who, run in runners:
                taken, images = run(make(), pixels, iterations)
                seconds.setdefault(who, []).append(taken)
                raw = float(metrics.psnr(images, pixels))
                quality[who] = raw, float(metrics.patch_psnr(images, pixels, patch))
        for who, taken in seconds.items():
            best = min(taken)
            print(f"  {who:14s} {1e3 * best:7.1f} ms/iteration, {best / unit:.2f} units, "
                  f"PSNR {quality[who][0]:.2f} raw {quality[who][1]:.2f} matched")  # fmt: skip
        if "breaching" in seconds:
            print(f"  ratio {min(seconds['vitguard']) / min(seconds['breaching']):.2f}")


def photo(name: str, model: Any) -> torch.Tensor:
    """One sample photo at the model's size, (1, 3, height, width)."""
    photos = sample_images(model.patch_embed.img_size)
    return photos.pixels[photos.names.index(name)][None]


def parameters(options: argparse.Namespace) -> None:
    """The survey's table: which part of the gradient leaks, on one model and several photos."""
    print("| matched | raw dB | matched dB | above own start |\n|---|---|---|---|")
    for selector in ("all", "attention", "mlp", "patch", "position"):
        raw, matched, gain = [], [], []
        for name in options.photos:
            pixels = photo(name, small_model())
            view = view_of(small_model(), pixels)
            runs: list[Guess] = [
                InvertingGradients(iterations=n, parameters=selector).run(
                    view, torch.Generator().manual_seed(0)
                )
                for n in (1, options.iterations)
            ]
            start, end = (float(metrics.patch_psnr(g.images, pixels, (4, 4))) for g in runs)
            raw.append(float(metrics.psnr(runs[1].images, pixels)))
            matched.append(end)
            gain.append(end - start)
        mean = statistics.mean
        print(f"| {selector} | {mean(raw):.1f} | {mean(matched):.1f} | {mean(gain):.1f} |")


def table(options: argparse.Namespace) -> None:
    """Attacks over batch sizes on a CIFAR ViT: mean over the batch, from noise and from a start."""
    sys.path.insert(0, options.data)
    from load import cifar10  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    pixels, labels = cifar10("test", options.decoys + max(options.batches))
    images = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
    decoys, patch = images[max(options.batches) :], (4, 4)
    normalization = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    print("| B | positions | start | attack | raw | matched | floor | at the start | identified "
          "| CPU s |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for batch in options.batches:
        truth, floor = images[:batch], metrics.baseline(images[:batch], patch)
        for kind in options.positions:
            model = timm.create_model(
                "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=128, depth=4,
                num_heads=4, mlp_ratio=2, num_classes=10,
            )  # fmt: skip
            model.load_state_dict(load_file(f"{options.data}/weights/{options.weights}"))
            stack = parse_stack("none" if kind == "learnable" else f"positions:kind={kind}")
            guard = protect(model.train(), stack)
            aims = torch.tensor(labels[:batch])
            update = guard.update(normalization.apply(truth), aims)
            view = CuriousServer().view(guard, update, normalization)
            for start in options.starts:
                guess = None
                if start != "noise":
                    guess = parse_attack(start).run(view, torch.Generator().manual_seed(0))
                for name in options.attacks:
                    attack = attack_types()[name].fast(start=guess)  # type: ignore[attr-defined]
                    began = time.process_time()
                    first = dataclasses.replace(attack, iterations=1)
                    got = attack.run(view, torch.Generator().manual_seed(0))
                    spent = time.process_time() - began
                    own = first.begins_at(view, torch.Generator().manual_seed(0))
                    result = metrics.score(got.images, truth, patch, decoys=decoys)
                    before = metrics.score(own, truth, patch).patch_psnr.mean()
                    print(f"| {batch} | {kind} | {start} | {name} | {result.psnr.mean():.1f} "
                          f"| {result.patch_psnr.mean():.1f} | {floor.psnr.mean():.1f} / "
                          f"{floor.patch_psnr.mean():.1f} | {before:.1f} | "
                          f"{int(result.identified.sum())}/{batch} | {spent:.0f} |",
                          flush=True)  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("speed", help="against breaching")
    timing.add_argument("--peer", action="append", default=[], metavar="PATH")
    timing.add_argument("--photo", default="astronaut")
    timing.add_argument("--iterations", type=int, default=200)
    timing.add_argument("--rounds", type=int, default=1)
    timing.add_argument("--threads", type=int, default=1)
    timing.add_argument(
        "--cpu-clock", action="store_true", help="count CPU seconds: for a machine that is shared"
    )
    timing.set_defaults(run=speed)
    parts = commands.add_parser("parameters", help="attention, MLP, patch, position or all")
    parts.add_argument("--photos", nargs="+", default=["astronaut", "coffee", "chelsea"])
    parts.add_argument("--iterations", type=int, default=200)
    parts.add_argument("--threads", type=int, default=1)
    parts.set_defaults(run=parameters, cpu_clock=False)
    research = commands.add_parser("table", help="attacks over batch sizes on a CIFAR ViT")
    research.add_argument("--data", required=True, help="folder with load.py and weights")
    research.add_argument("--weights", default="cifar10_vit_b.safetensors")
    research.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    research.add_argument("--positions", nargs="+", default=["learnable", "sincos"])
    research.add_argument("--starts", nargs="+", default=["noise"], help="noise, or an attack")
    research.add_argument(
        "--attacks", nargs="+",
        default=["dlg", "idlg", "inverting", "gradinversion", "gradvit", "april-opt"],
    )  # fmt: skip
    research.add_argument("--decoys", type=int, default=100)
    research.add_argument("--threads", type=int, default=1)
    research.set_defaults(run=table, cpu_clock=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cpu_clock:
        global clock
        clock = time.process_time
    options.run(options)


if __name__ == "__main__":
    main()
