"""Does an inspection tell crafted weights from honest ones, and what does it cost?

    OMP_NUM_THREADS=1 python benchmarks/inspection.py honest --half 1 --out judged.jsonl
    OMP_NUM_THREADS=1 python benchmarks/inspection.py crafts --out crafts.jsonl
    OMP_NUM_THREADS=1 python benchmarks/inspection.py judge --honest judged.jsonl \\
        --crafts crafts.jsonl
    OMP_NUM_THREADS=1 python benchmarks/inspection.py cost
    OMP_NUM_THREADS=1 python benchmarks/inspection.py adaptive --out adaptive.jsonl [--figure F.png]

`honest` inspects honest checkpoints (inspecting/honest.py): those of half 0, on which the limits
were chosen, or those of half 1. `crafts` inspects the crafts as published (inspecting/crafts.py),
written into random weights of timm, torchvision and transformers and into trained ones.
`judge` prints false alarms, misses and the area under the curve. `cost` measures an inspected
training step beside a plain one. `adaptive` is the adversary that knows the detector.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from inspecting.crafts import adaptive, published, tokens_told_apart
from inspecting.honest import KINDS, checkpoints, photos, tiny, victims

import vitguard as vg
from vitguard.errors import NotApplicable
from vitguard.inspection import SIGNS, Memory, inspect_model, load_exactly
from vitguard.vit import Anatomy


def honest(out: Path, half: int, kind: str) -> None:
    """Append a line for each honest checkpoint."""
    with out.open("a") as file:
        for number, c in enumerate(checkpoints(half, kind)):
            c.model.train()
            anatomy = Anatomy.of(c.model)
            found = inspect_model(c.model, anatomy, c.images, c.labels, c.memory)
            line = {
                "kind": c.kind, "run": c.run, "batch": len(c.images), "score": found.score,
                "signs": {s.name: s.value for s in found.signs},
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            file.flush()
            if number % 50 == 0:
                print(number, c.kind, f"{found.score:.2f}", flush=True)


def judge(lines: list[dict], crafted: list[dict]) -> None:
    """Print the largest honest value of each sign, false alarms, misses, area under the curve."""
    for name, (limit, _) in SIGNS.items():
        having = [line for line in lines if name in line["signs"]]
        if not having:
            continue
        worst = max(having, key=lambda line: line["signs"][name])
        where = f"{worst['kind']}, batch of {worst['batch']}"
        print(f"{name:20} limit {limit:10.4g}  largest {worst['signs'][name]:10.4g}  {where}")
    wrong = [line for line in lines if score(line) > 1]
    kinds = collections.Counter(line["kind"].split(" vit")[0] for line in lines)
    print(f"{len(lines)} honest checkpoints ({kinds}): {len(wrong)} false alarms")
    for line in wrong:
        beyond = {n: v for n, v in line["signs"].items() if v > SIGNS[n][0]}
        print(f"  {line['kind']}, run {line['run']}, batch of {line['batch']}: {beyond}")

    refused = [line for line in crafted if "refused" in line]
    for line in refused:
        print(f"not written: {line['craft']} into {line['kind']}: {line['refused']}")
    written = [line for line in crafted if "refused" not in line]
    for what in ("kind", "craft"):
        for name in dict.fromkeys(line[what] for line in written):
            _seen(name, [line for line in written if line[what] == name], lines)
    _seen("all", written, lines)


def _seen(name: str, found: list[dict], honest_ones: list[dict]) -> None:
    seen = sum(score(line) > 1 for line in found)
    wins = [
        (score(c) > score(h)) + 0.5 * (score(c) == score(h)) for c in found for h in honest_ones
    ]
    print(
        f"{name}: {seen} of {len(found)} suspicious, area under the curve "
        f"{statistics.mean(wins):.4f}, lowest score {min(map(score, found)):.3g}"
    )


def score(line: dict) -> float:
    """Return the score that the limits of the package give to a line."""
    return max(v / SIGNS[n][0] for n, v in line["signs"].items())


def crafts(out: Path, only: str) -> None:
    """Append a line for each craft on each model, or why it cannot be written into that."""
    with out.open("a") as file:

        def keep(line: dict) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for kind, model, images, labels in victims():
            if only not in kind:
                continue
            own = {n: t.clone() for n, t in model.state_dict().items()}
            for craft, write in published():
                try:
                    weights = write(model)
                except NotApplicable as error:
                    print(f"NOT WRITTEN: {craft} into {kind}: {error}", flush=True)
                    keep({"craft": craft, "kind": kind, "refused": str(error)})
                    continue
                if all(bool(torch.equal(weights[n], t)) for n, t in own.items()):
                    raise SystemExit(f"{craft} changed nothing in {kind}")
                for size in (1, len(images)):
                    load_exactly(model, weights)
                    anatomy = Anatomy.of(model)
                    found = inspect_model(model, anatomy, images[:size], labels[:size], Memory())
                    keep({
                        "craft": craft, "kind": kind, "batch": size, "score": found.score,
                        "signs": {s.name: s.value for s in found.signs},
                    })  # fmt: skip
                load_exactly(model, own)
            print(kind, flush=True)


def cost() -> None:
    """Print processor time of a plain step and of an inspected one, in turns.

    What one costs more is the median of the ratios of neighbouring steps: on a shared machine the
    speed changes between steps, and hardly between neighbours. The kernel's part, which hands out
    memory anew in plain and inspected steps alike, scatters most; without it stands beside.
    """
    sizes = [
        ("CIFAR ViT", 32, 64, 80), ("vit_tiny_patch16_224", 224, 16, 12),
        ("vit_small_patch16_224", 224, 8, 12), ("vit_base_patch16_224", 224, 4, 8),
    ]  # fmt: skip
    for name, size, batch, steps in sizes:
        make = (lambda n=name: timm.create_model(n, num_classes=10)) if size > 32 else tiny_cifar
        guards = [vg.protect(make().train(), s) for s in ([], [vg.InspectWeights()])]
        images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 10
        times: list[list[tuple[float, float]]] = [[], []]
        for step in range(steps + 1):
            for i in (0, 1) if step % 2 else (1, 0):
                began = resource.getrusage(resource.RUSAGE_SELF)
                guards[i].update(images, labels)
                ended = resource.getrusage(resource.RUSAGE_SELF)
                user = ended.ru_utime - began.ru_utime
                times[i].append((user + ended.ru_stime - began.ru_stime, user))
        plain, inspected = (t[1:] for t in times)  # the first one warms up
        ratios = [
            sorted(b[kind] / a[kind] - 1 for a, b in zip(plain, inspected, strict=True))
            for kind in (0, 1)
        ]
        whole, user = (statistics.median(r) for r in ratios)
        print(
            f"{name}, batch of {batch}, {steps} steps of "
            f"{statistics.median(t for t, _ in plain):.3f} s: {whole:+.1%} (quartiles "
            f"{ratios[0][steps // 4]:+.1%} and {ratios[0][-1 - steps // 4]:+.1%}), without the "
            f"kernel's part {user:+.1%}",
            flush=True,
        )


def tiny_cifar() -> torch.nn.Module:
    """Return the architecture of the CIFAR-10 ViTs."""
    return tiny(0, embed_dim=128, depth=4, mlp_ratio=2)


def known_to_adversary() -> Iterator[tuple[str, dict]]:
    """Yield what an adversary that knows the detector tries, by what it gives up."""
    yield "as published", {}
    # no muted branch, columns behind the bins of honest size and of any sign, thresholds that jump
    quiet = {"mute": 1.0, "output": 0.02, "varied": True, "jitter": 1.0}
    yield "nothing muted, uneven thresholds", quiet
    for noise in (0.1, 0.2, 0.35, 0.5, 0.7, 1.0):
        yield "and noise on the rows", {**quiet, "noise": noise}
    for directions in (4, 16, 64, 192):
        yield "and spread directions", {**quiet, "directions": directions}
    for steepness in (20.0, 10.0, 5.0, 2.0):
        yield "and milder steps", {**quiet, "steepness": steepness}
    for share in (0.5, 0.2, 0.1, 0.05, 0.02):
        yield "and fewer bins", {**quiet, "share": share}
    for share in (0.2, 0.09, 0.045):  # all rows longer, so that those of the bins are not
        for norm in (5.0, 10.0, 20.0):
            for noise in (0.0, 0.5):
                mild = {"share": share, "noise": noise, "norm": norm, "steepness": 3.2 * norm}
                yield "all at once", {**quiet, **mild}


def adaptive_curve(out: Path) -> None:
    """Write leak and score of milder and milder imprints."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, depth=4)
    own = {n: t.clone() for n, t in model.state_dict().items()}
    images, labels, public = photos(4, 64, 0), torch.arange(4), photos(32, 64, 3)
    with out.open("w") as file:
        for family, settings in known_to_adversary():
            weights = adaptive(model, public=public, **settings)
            leak = tokens_told_apart(model, weights, images, labels)
            load_exactly(model, weights)
            found = inspect_model(model, Anatomy.of(model), images, labels, Memory())
            load_exactly(model, own)
            line = {
                "family": family, "settings": settings, "leak": leak, "score": found.score,
                "signs": {s.name: s.value for s in found.signs},
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            worst = max(found.signs, key=lambda s: s.excess)
            print(f"{family} {settings}: {leak:.2f}, {found.score:.3g} ({worst.name})", flush=True)


def draw(lines: list[dict], figure: Path) -> None:
    """Draw leak against score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for family in dict.fromkeys(line["family"] for line in lines):
        points = [(min(score(p), 1e4), p["leak"]) for p in lines if p["family"] == family]
        axes.plot(*zip(*sorted(points), strict=True), "o", label=family, alpha=0.8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="score of the inspection (refused above 1)", ylim=(-0.02, 1))
    axes.set_ylabel("share of patches that row differences give")
    axes.legend()
    pyplot.savefig(figure, dpi=110)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["honest", "crafts", "judge", "cost", "adaptive"])
    parser.add_argument("--half", type=int, choices=[0, 1], default=1)
    parser.add_argument("--kind", choices=["", *KINDS], default="")
    parser.add_argument("--weights", default="", help="crafts: into models with this in their name")
    parser.add_argument("--out", type=Path, default=Path("inspected.jsonl"))
    parser.add_argument("--honest", type=Path, default=Path("judged.jsonl"))
    parser.add_argument("--crafts", type=Path, default=Path("crafts.jsonl"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.what == "honest":
        honest(options.out, options.half, options.kind)
    elif options.what == "crafts":
        crafts(options.out, options.weights)
    elif options.what == "judge":
        judge(lines_of(options.honest), lines_of(options.crafts))
    elif options.what == "cost":
        cost()
    else:
        adaptive_curve(options.out)
        if options.figure:
            draw(lines_of(options.out), options.figure)


def lines_of(path: Path) -> list[dict]:
    """Return what was written to a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
