"""What the patch shuffle costs in accuracy, and what the audit still gets out of it.

    python benchmarks/shuffle_tradeoff.py train  --out RUNS [--seeds 3 --images 10000 --epochs 6]
    python benchmarks/shuffle_tradeoff.py audit  --out RUNS [--photos 4]
    python benchmarks/shuffle_tradeoff.py report --out RUNS --docs docs

`train` trains every configuration with the same steps (examples/train_cifar10.py does it), one
JSON line and one weight file a run; stopped and started again it goes on with the next run.
`audit` attacks one gradient of each trained model at batch size 1, and keeps what it has done.
`report` writes the table into `shuffle.md`, and the pictures `shuffle-tradeoff.png` and
`shuffle-seen.png` into `images`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image

import vitguard as vg
from vitguard.data import sample_images
from vitguard.defenses.base import Defense
from vitguard.metrics import baseline
from vitguard.registry import attack_types, parse_stack
from vitguard.tracking import what_the_model_saw

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_cifar10

RATIO = 0.7
RATIOS = (0.05, 0.1, 0.3, 0.5, 0.9)
CONFIGURATIONS = {
    "plain": "none",
    "shuffle": "shuffle:ratio={ratio}",
    "shuffle + DAL(positions)": "shuffle:ratio={ratio},steps={steps},dal=positions",
    "sincos": "positions:kind=sincos",
    "sincos + shuffle + DAL(tokens)": (
        "positions:kind=sincos+shuffle:ratio={ratio},steps={steps},dal=tokens"
    ),
}
# the papers' own training: ratio 0.1, one draw a batch, half of the batches after a warm-up, and
# DAL with its falling weight; attacked as it is after the warm-up, in a batch that is shuffled
PAPER, PAPER_RATIO = "as the papers train", 0.1
_PAPER_SPEC = (
    "shuffle:ratio=0.1,draw=batch,probability=0.5,warmup={warmup},steps={steps},dal=positions"
)
_FIRST, _LAST = "<!-- results -->", "<!-- end of results -->"
ATTACKS = ("ladder:seconds=120",)


def runs(seeds: int, steps: int) -> Iterator[tuple[str, float, int, str]]:
    """Yield (configuration, ratio, seed, spec): one seed of all first, then ratios, then seeds."""

    def table(seed: int) -> Iterator[tuple[str, float, int, str]]:
        for name, spec in CONFIGURATIONS.items():
            ratio = RATIO if "shuffle" in name else 0.0
            yield name, ratio, seed, spec.format(ratio=ratio, steps=steps)

    yield from table(0)
    for ratio in RATIOS:
        yield "shuffle", ratio, 0, CONFIGURATIONS["shuffle"].format(ratio=ratio)
    yield PAPER, PAPER_RATIO, 0, _PAPER_SPEC.format(warmup=max(1, steps // 20), steps=steps)
    for seed in range(1, seeds):
        yield from table(seed)


def train(options: argparse.Namespace) -> None:
    """Train what is not there yet."""
    arguments = [
        f"--images={options.images}", f"--epochs={options.epochs}", f"--width={options.width}",
        f"--depth={options.depth}", f"--image-size={options.image_size}", "--device=cpu",
        f"--batch-size={options.batch_size}",
    ]  # fmt: skip
    given = train_cifar10.parser().parse_args(arguments)
    data = train_cifar10.load_data(options.data, images=given.images, image_size=given.image_size)
    steps = given.epochs * (len(data.train) // given.batch_size)
    done = {(r["configuration"], r["ratio"], r["seed"]) for r in _lines(options.out, "runs")}
    for name, ratio, seed, spec in runs(options.seeds, steps):
        if (name, ratio, seed) in done:
            continue
        if options.until and time.strftime("%H:%M", time.gmtime()) >= options.until:
            break
        given.seed, given.defense = seed, spec
        training = train_cifar10.Training(given, data)
        started = time.perf_counter()
        accuracy = training.run(quiet=True)
        torch.save(training.model.state_dict(), options.out / f"{_file(name, ratio, seed)}.pt")
        line = {
            "configuration": name, "ratio": ratio, "seed": seed, "spec": spec,
            "accuracy": accuracy, "steps": training.step, "images": len(data.train),
            "epochs": given.epochs, "width": given.width, "depth": given.depth,
            "image_size": given.image_size, "batch_size": given.batch_size,
            "classes": data.classes, "seconds": time.perf_counter() - started,
        }  # fmt: skip
        _append(options.out, "runs", line)
        print(f"{name:32} ratio {ratio:4} seed {seed}: {accuracy:.4f} in {line['seconds']:.0f} s")


def audit(options: argparse.Namespace) -> None:
    """Attack what was trained and not attacked yet."""
    attacks = [a for a in options.attacks or ATTACKS if a.split(":")[0] in attack_types()]
    done = {(r["configuration"], r["ratio"], r["seed"], r["attack"]) for r in _audits(options.out)}
    for run in _lines(options.out, "runs"):
        key = (run["configuration"], run["ratio"], run["seed"])
        missing = [a for a in attacks if (*key, a) not in done]
        if not missing or run["seed"] >= options.seeds:
            continue
        given = train_cifar10.parser().parse_args([])
        given.width, given.depth, given.image_size = run["width"], run["depth"], run["image_size"]
        data = train_cifar10.load_data(options.data, images=10, image_size=given.image_size)
        pixels, labels = data.test[: options.photos]
        pixels = pixels.float() / 255
        model = train_cifar10.build(given, run["classes"])
        state = torch.load(options.out / f"{_file(*key)}.pt", weights_only=True)
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("vitguard.")})
        floor = baseline(pixels, (given.patch_size,) * 2)
        for attack in missing:
            started = time.perf_counter()
            report = vg.audit(
                model, (pixels, labels), defenses=attacked(run["spec"]), attacks=[attack],
                batch_size=1, normalization=train_cifar10.NORMALIZATION,
            )  # fmt: skip
            finding = report.findings[-1]
            line = dict(zip(("configuration", "ratio", "seed"), key, strict=True)) | {
                "attack": attack, "verdict": finding.verdict,
                "psnr": list(finding.psnr.per_image) if finding.psnr else None,
                "patch_psnr": list(finding.patch_psnr.per_image) if finding.patch_psnr else None,
                "mask": [finding.mask.precision, finding.mask.recall] if finding.mask else None,
                "floor": floor.psnr.tolist(), "patch_floor": floor.thumbnail.tolist(),
                "seconds": time.perf_counter() - started,
            }  # fmt: skip
            _append(options.out, "audits", line)
            print(f"{key} {attack}: {finding.verdict} in {line['seconds']:.0f} s", flush=True)


def attacked(spec: str) -> list[Defense]:
    """Return the stack as it is in a step that shuffles: after a warm-up, the coin fell so."""
    return [
        replace(d, warmup=0, steps=0, schedule="constant", probability=1.0)
        if isinstance(d, vg.PatchShuffle) else d
        for d in parse_stack(spec)
    ]  # fmt: skip


def best(audits: list[dict[str, Any]], name: str, ratio: float, what: str) -> list[float]:
    """Return the best attack's dB on each image of each seed; empty where none applied."""
    rows = [a for a in audits if (a["configuration"], a["ratio"]) == (name, ratio) and a[what]]
    seeds = {
        seed: [a[what] for a in rows if a["seed"] == seed] for seed in {a["seed"] for a in rows}
    }
    return [max(image) for tries in seeds.values() for image in zip(*tries, strict=True)]


def report(options: argparse.Namespace) -> None:
    """Write the table and the figure."""
    done, audits = _lines(options.out, "runs"), _audits(options.out)
    if not done:
        raise SystemExit(f"Expected runs in {options.out}, found none. Run `train` first.")
    (options.docs / "images").mkdir(parents=True, exist_ok=True)
    page = options.docs / "shuffle.md"
    text = page.read_text() if page.is_file() else f"{_FIRST}\n{_LAST}\n"
    before, _, rest = text.partition(_FIRST)
    _, _, after = rest.partition(_LAST)
    made = "\n".join([_FIRST, "", *_table(done, audits), "", _LAST])
    page.write_text(before + made + after)
    _figure(done, audits, options.docs / "images" / "shuffle-tradeoff.png")
    _seen(options.docs / "images" / "shuffle-seen.png")


def _seen(path: Path) -> None:
    """Draw scikit-image's photos, and below each what a model sees of it at a ratio of 70 %."""
    photos = sample_images((224, 224), count=5).pixels
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    guard = vg.protect(model.train(), [vg.PatchShuffle(0.7)], generator=torch.Generator())
    with torch.no_grad():
        model(photos)
    rows = torch.stack([photos, what_the_model_saw(guard, photos)])
    sheet = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)
    values = (sheet.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(values).resize((800, 320), Image.Resampling.LANCZOS).save(path)


def _table(done: list[dict[str, Any]], audits: list[dict[str, Any]]) -> Iterator[str]:
    first = done[0]
    yield (
        f"Budget: ViT of width {first['width']}, depth {first['depth']}, {first['image_size']} px "
        f"in 4 px patches, {first['images']:,} CIFAR-10 images, {first['epochs']} epochs "
        f"({first['steps']:,} steps of {first['batch_size']}), AdamW, the same for all. Accuracy "
        "on 2,000 test images, mean and range over seeds. Attack: `ladder`, up to 120 s an image, "
        "on the gradient of one image in a step that shuffles; "
        f"{len(audits[0]['floor']) if audits else 0} test images a seed, medians."
    )
    yield ""
    yield (
        "| configuration | ratio | seeds | accuracy % (range) | image dB (raw) "
        "| content dB (matched) | content above flat patches | mask precision / recall |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, ratio in _rows(done):
        accuracy = _accuracy(done, name, ratio)
        spread = f" ({min(accuracy):.1f} to {max(accuracy):.1f})" if len(accuracy) > 1 else ""
        leaks = [a for a in audits if a["patch_psnr"]]
        content, floors = (best(leaks, name, ratio, w) for w in ("patch_psnr", "patch_floor"))
        over = sum(c > f for c, f in zip(content, floors, strict=True))
        masks = [
            a["mask"] for a in audits
            if (a["configuration"], a["ratio"]) == (name, ratio) and a["mask"]
        ]  # fmt: skip
        told = [statistics.mean(m[i] or 0 for m in masks) for i in range(2)] if masks else []
        cells = [
            name, f"{ratio:g}" if ratio else "", str(len(accuracy)),
            f"{statistics.mean(accuracy):.1f}{spread}",
            _median(best(audits, name, ratio, "psnr")), _median(content),
            f"{over} of {len(content)} images" if content else "",
            " / ".join(f"{m:.2f}" for m in told),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    if audits:
        flat, patches = (statistics.median(audits[0][k]) for k in ("floor", "patch_floor"))
        yield ""
        yield f"Floors: best public colour {flat:.1f} dB, best flat patches {patches:.1f} dB."


def _rows(done: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Return (configuration, ratio): first the table of configurations, then the ratios."""
    places = {name: i for i, name in enumerate((*CONFIGURATIONS, PAPER))}
    rows = {(r["configuration"], r["ratio"]) for r in done}
    return sorted(rows, key=lambda row: (row[1] not in (0, RATIO), places[row[0]], row))


def _accuracy(done: list[dict[str, Any]], name: str, ratio: float) -> list[float]:
    """Return the accuracy of each seed in percent."""
    same = (name, ratio)
    return [100 * r["accuracy"] for r in done if (r["configuration"], r["ratio"]) == same]


def _figure(done: list[dict[str, Any]], audits: list[dict[str, Any]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("The figure needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    rows = _rows(done)
    sweep = sorted((r for r in rows if r[0] in ("plain", "shuffle")), key=lambda r: r[1])
    _costs(left, done, rows, sweep)
    _leaks(right, done, audits, rows, sweep)
    figure.savefig(path, dpi=130)


def _costs(axes: Any, done: list[dict[str, Any]], rows: list[Any], sweep: list[Any]) -> None:
    """Draw accuracy over the ratio."""
    means = [statistics.mean(_accuracy(done, *row)) for row in sweep]
    axes.plot([ratio for _, ratio in sweep], means, "-", color="black", linewidth=1)
    for (name, ratio), colour in zip(
        (row for row in rows if row[1] in (0, RATIO) or row[0] == PAPER),
        ("black", "tab:blue", "tab:cyan", "tab:green", "tab:olive", "tab:red"), strict=False,
    ):  # fmt: skip
        accuracy = _accuracy(done, name, ratio)
        middle = statistics.mean(accuracy)
        around = [[middle - min(accuracy)], [max(accuracy) - middle]]
        at = ratio + 0.01 * (("tokens" in name) - (name == "sincos") - ("positions" in name))
        axes.errorbar(
            [at], [middle], around, fmt="s", capsize=4, color=colour,
            label=f"{name}, {len(accuracy)} seed{'s' * (len(accuracy) > 1)}",
        )  # fmt: skip
    others = [row for row in sweep if row[1] not in (0, RATIO)]
    axes.plot(
        [ratio for _, ratio in others], [_accuracy(done, *row)[0] for row in others], "o",
        color="black", markersize=4, label="shuffle, other ratios, 1 seed",
    )  # fmt: skip
    axes.set(xlabel="ratio of patches shuffled", ylabel="test accuracy, %", title="What it costs")
    axes.legend(fontsize=7)


def _leaks(
    axes: Any, done: list[dict[str, Any]], audits: list[dict[str, Any]], rows: list[Any],
    sweep: list[Any],
) -> None:  # fmt: skip
    """Draw what the ladder gets over the accuracy; each ratio is a column of two points."""
    sincos = [row for row in rows if row[0].startswith("sincos")]
    for what, colour, label in (
        ("patch_psnr", "tab:red", "content: patches matched"),
        ("psnr", "tab:blue", "order too: raw image"),
    ):
        for group, marker, kind in ((sweep, "o", "shuffle"), (sincos, "^", "sincos")):
            known = [(row, best(audits, *row, what)) for row in group]
            points = [
                (statistics.mean(_accuracy(done, *row)), statistics.median(dB), row[1])
                for row, dB in known if dB
            ]  # fmt: skip
            if not points:
                continue
            points.sort(key=lambda point: point[2])
            x, y, _ = zip(*points, strict=True)
            line = ":" if group is sweep else ""
            hollow = {"markersize": 10, "fillstyle": "none"} if what == "patch_psnr" else {}
            axes.plot(x, y, marker + line, color=colour, label=f"{label} ({kind})", **hollow)
            for at, dB, ratio in points:
                axes.annotate(
                    f"{ratio:g}", (at, dB), textcoords="offset points", xytext=(4, 7), fontsize=7
                )
    if audits:
        for key, style, label in (
            ("floor", ":", "public colour"), ("patch_floor", "--", "flat patches"),
        ):  # fmt: skip
            level = statistics.median(audits[0][key])
            axes.axhline(level, color="grey", linestyle=style, label=f"no information: {label}")
    axes.set(
        xlabel="test accuracy, %", ylabel="dB, median of the ladder's guesses", yscale="log",
        title="What one gradient still tells (batch size 1); numbers are ratios",
    )  # fmt: skip
    ticks = [10, 15, 20, 30, 50, 100]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.legend(fontsize=7, loc="center left")


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else ""


def _file(name: str, ratio: float, seed: int) -> str:
    return "".join(c if c.isalnum() else "_" for c in f"{name}-{ratio}-{seed}")


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _audits(folder: Path) -> list[dict[str, Any]]:
    return _lines(folder, "audits")


def _append(folder: Path, name: str, line: dict[str, Any]) -> None:
    with open(folder / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Read the command line and do one of the three."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("train", "audit", "report"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", help="folder with cifar10.npz; VITGUARD_DATA by default")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--seeds", type=int, default=3, help="to train; audit: seeds below this")
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=24)
    parser.add_argument("--photos", type=int, default=4, help="test images to attack")
    parser.add_argument("--attacks", nargs="+", help="instead of all exact ones")
    parser.add_argument("--until", help="start no run after this time of day, HH:MM in UTC")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    {"train": train, "audit": audit, "report": report}[options.what](options)


if __name__ == "__main__":
    main()
