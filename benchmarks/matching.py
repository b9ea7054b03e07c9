"""Gradient matching: time and quality against breaching, and the table over batches and models.

    python benchmarks/matching.py speed --peer PATH [--peer PATH ...] [--threads N]
    python benchmarks/matching.py parameters
    python benchmarks/matching.py table --data FOLDER [--attacks ...] [--batches 1 2 4 8]
    python benchmarks/matching.py identify --data FOLDER [--attack ladder:seconds=60] [--then ...]
    python benchmarks/matching.py labels --data FOLDER [--batches 8 32]

`speed` runs both attackers on the same models, photos, iterations and threads, turn by turn, each
from the same noise: where a run ends in raw PSNR hangs on its noise by 2 dB and more, so figures
are medians over photos and seeds. The peer (https://github.com/JonasGeiping/breaching) and what it
imports (hydra-core, omegaconf, lpips) are installed beside this project and found in the folders
given with `--peer`.
"""

from __future__ import annotations

import argparse
import copy
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
from vitguard.attacks.labels import infer_labels
from vitguard.audit.attempts import labels_overlap
from vitguard.core import Guess, Normalization, View
from vitguard.data import decoys as sampled_decoys
from vitguard.data import load_images, sample_images
from vitguard.guard import protect
from vitguard.registry import attack_types, parse_attack, parse_stack
from vitguard.threats import CuriousServer
from vitguard.vit import Anatomy

NORMALIZATION = Normalization()
clock = time.perf_counter
LABEL = torch.tensor([3])
INNER = 20  # evaluations of the update in one iteration of L-BFGS


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
    model: torch.nn.Module, pixels: torch.Tensor, noise: Guess, iterations: int, *, fast: bool
) -> tuple[float, torch.Tensor]:
    """Seconds per iteration and the images of `inverting`, the paper's settings or `fast`."""
    view = view_of(model, pixels)
    preset = InvertingGradients.fast if fast else InvertingGradients
    attack = preset(iterations=iterations, start=noise)
    began = clock()
    guess = attack.run(view, torch.Generator().manual_seed(0))
    return (clock() - began) / iterations, guess.images


def theirs(
    model: torch.nn.Module, pixels: torch.Tensor, noise: Guess, iterations: int
) -> tuple[float, torch.Tensor]:
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
    began = clock()
    first = NORMALIZATION.apply(noise.images)
    result, _ = attacker.reconstruct([server], [shared], {}, initial_data=first)
    seconds = (clock() - began) / iterations
    return seconds, NORMALIZATION.invert(result["data"]).clamp(0, 1).detach()


def speed(options: argparse.Namespace) -> None:
    """All attackers, turn by turn, on both models, each photo and seed."""
    sys.path[:0] = options.peer
    warnings.simplefilter("ignore")
    runners: dict[str, Callable[..., tuple[float, torch.Tensor]]] = {
        "vitguard": functools.partial(ours, fast=False),
        "vitguard fast": functools.partial(ours, fast=True),
    }
    if options.peer:
        import logging

        logging.disable(logging.CRITICAL)
        runners["breaching"] = theirs
    print(f"{options.threads} threads, {options.seeds} seeds each")
    small = ("32x32/4 d=192 depth 4", small_model, options.iterations, 30)
    tiny = ("vit_tiny_patch16_224", tiny_model, options.tiny_iterations, 6)
    for name, make, iterations, repeat in (small, tiny) if options.tiny_iterations else (small,):
        seconds: dict[str, list[float]] = {who: [] for who in runners}
        scores: dict[str, list[tuple[float, float]]] = {who: [] for who in runners}
        units = []
        patch = Anatomy.of(make()).patch_size
        for which, pixels in subjects(options, make()):
            for seed in range(options.seeds):
                units.append(forward_backward(make(), pixels, repeat))
                view, seeded = view_of(make(), pixels), torch.Generator().manual_seed(seed)
                noise = Guess(images=InvertingGradients().begins_at(view, seeded))
                for who, run in runners.items():
                    taken, images = run(make(), pixels, noise, iterations)
                    seconds[who].append(taken)
                    score = metrics.score(images, pixels, patch)
                    scores[who].append((float(score.psnr), float(score.patch_psnr)))
                    print(f"  {which} {seed} {who:14s} {1e3 * taken:7.1f} ms "
                          f"{scores[who][-1][0]:.2f} raw {scores[who][-1][1]:.2f} matched",
                          file=sys.stderr, flush=True)  # fmt: skip
        report(name, iterations, units, seconds, scores)


def report(
    name: str,
    iterations: int,
    units: list[float],
    seconds: dict[str, list[float]],
    scores: dict[str, list[tuple[float, float]]],
) -> None:
    """Print medians over photos and seeds."""
    unit = statistics.median(units)
    print(f"\n{name}: {iterations} iterations, forward+backward {1e3 * unit:.1f} ms")
    for who, taken in seconds.items():
        each = statistics.median(taken)
        raw, matched = (statistics.median(column) for column in zip(*scores[who], strict=True))
        mean = [statistics.mean(column) for column in zip(*scores[who], strict=True)]
        print(f"  {who:14s} {1e3 * each:7.1f} ms/iteration, {each / unit:.2f} units, "
              f"median PSNR {raw:.2f} raw {matched:.2f} matched, "
              f"mean {mean[0]:.2f} raw {mean[1]:.2f} matched")  # fmt: skip
    for who in [name for name in seconds if "breaching" in seconds and name != "breaching"]:
        pairs = zip(seconds[who], seconds["breaching"], strict=True)
        print(f"  {who}: ratio of seconds {statistics.median(a / b for a, b in pairs):.2f}")
        for column, what in enumerate(("raw", "matched")):
            both = zip(scores[who], scores["breaching"], strict=True)
            gaps = [a[column] - b[column] for a, b in both]
            print(f"    {what} above breaching: {statistics.median(gaps):+.2f} dB in the median, "
                  f"{statistics.mean(gaps):+.2f} in the mean, {sum(g > 0 for g in gaps)} of "
                  f"{len(gaps)} pairs, from {min(gaps):+.2f} to {max(gaps):+.2f}")  # fmt: skip


def subjects(options: argparse.Namespace, model: Any) -> list[tuple[str, torch.Tensor]]:
    """The photos of `speed`, each (1, 3, height, width): of a folder, or the samples named."""
    if options.data is None:
        return [(name, photo(name, model)) for name in options.photos]
    photos = load_images(
        [f"{options.data}/photos"], model.patch_embed.img_size, count=options.count
    )
    return [(name, one[None]) for name, one in zip(photos.names, photos.pixels, strict=True)]


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


CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
HEADS = (
    "model", "B", "positions", "start", "attack", "evaluations", "raw", "matched", "floor",
    "at the start", "gain", "identified", "labels", "CPU s",
)  # fmt: skip


def cifar_case(options: argparse.Namespace, weights: str) -> Case:
    """A ViT that others trained on CIFAR-10, and its test photos."""
    sys.path.insert(0, options.data)
    from load import cifar10  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    pixels, labels = cifar10("test", options.skip + options.decoys + 8)[:2]
    images = torch.tensor(pixels[options.skip :]).permute(0, 3, 1, 2).float() / 255
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=128, depth=4,
        num_heads=4, mlp_ratio=2, num_classes=10,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = {"a": 1e-5, "b": 1e-6}[weights]
    model.load_state_dict(load_file(f"{options.data}/weights/cifar10_vit_{weights}.safetensors"))
    aims = torch.tensor(labels[options.skip :][:8]).long()
    return Case(f"CIFAR ViT {weights}", model, CIFAR, images[:8], aims, images[8:])


def photo_case(options: argparse.Namespace, name: str) -> Case:
    """A randomly initialised timm model and photos of a folder."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000)
    size = model.patch_embed.img_size
    truth = load_images([f"{options.data}/photos"], size, count=8).pixels
    return Case(
        name, model, NORMALIZATION, truth, torch.arange(8),
        sampled_decoys(options.decoys, size, seed=0, truth=truth),
    )  # fmt: skip


@dataclasses.dataclass
class Case:
    """What one model of the table is attacked on."""

    name: str
    model: Any
    normalization: Normalization
    truth: torch.Tensor
    labels: torch.Tensor
    decoys: torch.Tensor


def table(options: argparse.Namespace) -> None:
    """Attacks over batch sizes: means over the batch, from noise and from a start."""
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for name in options.models:
        trained = name in ("a", "b")
        case = cifar_case(options, name) if trained else photo_case(options, name)
        for batch in options.batches:
            for kind in options.positions:
                stack = parse_stack("none" if kind == "learnable" else f"positions:kind={kind}")
                guard = protect(copy.deepcopy(case.model).train(), stack)
                inputs = case.normalization.apply(case.truth[:batch])
                update = guard.update(inputs, case.labels[:batch])
                view = CuriousServer().view(guard, update, case.normalization)
                for start in options.starts:
                    lines(options, case, batch, kind, start, view)


def lines(
    options: argparse.Namespace, case: Case, batch: int, kind: str, start: str, view: View
) -> None:
    """One line for each attack on one view."""
    truth, patch = case.truth[:batch], Anatomy.of(case.model).patch_size
    floor = metrics.baseline(truth, patch)
    guess = None
    if start != "noise":
        guess = parse_attack(start).run(view, torch.Generator().manual_seed(0))
    for name in options.attacks:
        sizes: dict[str, Any] = {"start": guess}
        inner = INNER if name in ("dlg", "idlg", "april-opt") else 1
        if options.evaluations:
            sizes["iterations"] = max(1, options.evaluations // inner)
        if options.restarts and name in ("gradinversion", "gradvit"):
            sizes["restarts"] = options.restarts
        attack = attack_types()[name].fast(**sizes)  # type: ignore[attr-defined]
        began = time.process_time()
        got = attack.run(view, torch.Generator().manual_seed(0))
        spent = time.process_time() - began
        own = attack.begins_at(view, torch.Generator().manual_seed(0))
        result = metrics.score(got.images, truth, patch, decoys=case.decoys)
        before = metrics.score(own, truth, patch).patch_psnr.mean()
        right = labels_overlap(got.labels, case.labels[:batch])
        after, level = result.patch_psnr.mean(), floor.thumbnail.mean()
        cells = (
            case.name, batch, kind, start, name, got.details["iterations"] * inner,
            f"{result.psnr.mean():.1f}", f"{after:.1f}", f"{floor.psnr.mean():.1f} / {level:.1f}",
            f"{before:.1f}", f"{after - before:+.1f}", f"{int(result.identified.sum())}/{batch}",
            f"{right or 0:.2f}", f"{spent:.0f}",
        )  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def identify(options: argparse.Namespace) -> None:
    """Images of many batches identified among 100 decoys: an attack's, and matching from there.

    The decoys are the folder's other photos, filled up with crops of the sample photos.
    """
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=1000)
    size, batch = model.patch_embed.img_size, options.batch  # type: ignore[union-attr,operator]
    photos = load_images([f"{options.data}/photos"], size, count=100).pixels
    begin, end = options.skip, options.skip + options.count * batch
    if len(photos) < end:
        raise SystemExit(f"expected {end} photos in {options.data}/photos, got {len(photos)}")
    fill = sampled_decoys(100, size, seed=0, truth=photos[:1])
    patch = Anatomy.of(model).patch_size
    print("| positions | photos | attack | identified | matched dB, each image | floor | CPU s |")
    print(f"|{'---|' * 7}")
    hits: dict[tuple[str, str], list[int]] = {}
    for kind in options.positions:
        for first in range(begin, end, batch):
            truth, aims = photos[first : first + batch], torch.arange(first, first + batch)
            decoys = torch.cat([photos[:first], photos[first + batch :], fill])[:100]
            stack = parse_stack("none" if kind == "learnable" else f"positions:kind={kind}")
            guard = protect(copy.deepcopy(model).train(), stack)
            update = guard.update(NORMALIZATION.apply(truth), aims)
            view = CuriousServer().view(guard, update, NORMALIZATION)
            floor = metrics.baseline(truth, patch).thumbnail.tolist()
            guess = None
            for name in (options.attack, *options.then):
                attack = parse_attack(name, fast=guess is not None)
                if guess is not None:
                    attack = dataclasses.replace(attack, start=guess)  # type: ignore[call-arg]
                began = time.process_time()
                got = attack.run(view, torch.Generator().manual_seed(0))
                spent = time.process_time() - began
                guess = guess or got
                score = metrics.score(got.images, truth, patch, decoys=decoys)
                found = int(score.identified.sum()) if score.identified is not None else 0
                hits.setdefault((kind, name), []).append(found)
                print(f"| {kind} | {first} to {first + batch - 1} | {name} | {found}/{batch} "
                      f"| {' '.join(f'{v:.1f}' for v in score.patch_psnr.tolist())} "
                      f"| {' '.join(f'{v:.1f}' for v in floor)} | {spent:.0f} |",
                      flush=True)  # fmt: skip
    for (kind, name), found in hits.items():
        print(f"{kind}, {name}: {sum(found)} of {len(found) * batch} identified")


def labels(options: argparse.Namespace) -> None:
    """Share of the labels of a batch that the head's gradient gives, over many batches."""
    print(
        "| model | B | batches | share of labels right | worst | all right |\n"
        "|---|---|---|---|---|---|"
    )
    options.skip, options.decoys = 1000, options.count * max(options.batches)
    for name in options.models:
        case = cifar_case(options, name)
        sys.path.insert(0, options.data)
        from load import cifar10  # type: ignore[import-not-found]

        known = torch.tensor(cifar10("test", options.skip + options.decoys + 8)[1]).long()
        pixels, known = torch.cat([case.truth, case.decoys]), known[options.skip :]
        for batch in options.batches:
            shares = []
            for k in range(options.count):
                part = slice(k * batch, (k + 1) * batch)
                guard = protect(copy.deepcopy(case.model).train(), [])
                update = guard.update(CIFAR.apply(pixels[part]), known[part])
                view = CuriousServer().view(guard, update, CIFAR)
                got = infer_labels(view, torch.Generator().manual_seed(k))
                shares.append(labels_overlap(got, known[part]) or 0.0)
            print(f"| {case.name} | {batch} | {options.count} | {statistics.mean(shares):.2f} "
                  f"| {min(shares):.2f} | {shares.count(1.0)} |", flush=True)  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    timing = commands.add_parser("speed", help="against breaching")
    timing.add_argument("--peer", action="append", default=[], metavar="PATH")
    timing.add_argument("--photos", nargs="+", default=["astronaut", "coffee", "chelsea"])
    timing.add_argument("--data", help="folder whose photos to take instead")
    timing.add_argument("--count", type=int, default=12, help="of the folder's photos")
    timing.add_argument("--seeds", type=int, default=2, help="of the noise that all start from")
    timing.add_argument("--iterations", type=int, default=200, help="on the small model")
    timing.add_argument("--tiny-iterations", type=int, default=4, help="0 leaves vit_tiny out")
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
    research = commands.add_parser("table", help="attacks over batch sizes and models")
    research.add_argument("--data", required=True, help="folder with load.py, weights and photos")
    research.add_argument(
        "--models", nargs="+", default=["a", "b"], help="a, b (trained on CIFAR-10) or a timm name"
    )
    research.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    research.add_argument("--positions", nargs="+", default=["learnable", "frozen"])
    research.add_argument("--starts", nargs="+", default=["noise"], help="noise, or an attack")
    research.add_argument(
        "--attacks", nargs="+",
        default=["dlg", "idlg", "inverting", "gradinversion", "gradvit", "april-opt"],
    )  # fmt: skip
    research.add_argument("--evaluations", type=int, help="of the update; the presets' by default")
    research.add_argument("--restarts", type=int)
    research.add_argument("--decoys", type=int, default=100)
    research.add_argument("--skip", type=int, default=0, help="test photos to leave out first")
    research.add_argument("--threads", type=int, default=1)
    research.set_defaults(run=table, cpu_clock=True)
    whole = commands.add_parser("identify", help="images of a batch told from 100 decoys")
    whole.add_argument("--data", required=True, help="folder with photos")
    whole.add_argument("--model", default="vit_base_patch32_224")
    whole.add_argument("--batch", type=int, default=4)
    whole.add_argument("--count", type=int, default=5, help="of batches")
    whole.add_argument("--skip", type=int, default=0, help="photos to leave out first")
    whole.add_argument("--positions", nargs="+", default=["frozen", "learnable"])
    whole.add_argument("--attack", default="ladder:seconds=60")
    whole.add_argument("--then", nargs="*", default=[], help="attacks that start from its guess")
    whole.add_argument("--threads", type=int, default=1)
    whole.set_defaults(run=identify, cpu_clock=True)
    counts = commands.add_parser("labels", help="labels of a batch from the head's gradient")
    counts.add_argument("--data", required=True, help="folder with load.py and weights")
    counts.add_argument("--models", nargs="+", default=["a", "b"])
    counts.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    counts.add_argument("--count", type=int, default=20)
    counts.add_argument("--threads", type=int, default=1)
    counts.set_defaults(run=labels, cpu_clock=False)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cpu_clock:
        global clock
        clock = time.process_time
    options.run(options)


if __name__ == "__main__":
    main()
