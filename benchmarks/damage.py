"""Images from damaged gradients: plain attacks, robust ones, and the best choice of parameters.

    python benchmarks/damage.py [--images N] [--first K] [--only WORD ...] [--more] [--figure FILE]
    python benchmarks/damage.py --map ROWS [--images N] [--first K] [--only WORD ...] [--seconds S]
        [--crop PIXELS] [--figure FILE]

Each of N CIFAR-10 test images goes through each of the two ViTs that others trained (in the folder
that VITGUARD_DATA names); figures are medians of PSNR over these 2 N cases, float32, batch size 1.
`position` is the undefended model, `span` the one with frozen positions. Noise is Gaussian, its
standard deviation relative to the root mean square of the whole gradient; `keep` zeroes all but the
largest entries of each tensor; local steps are full-batch SGD at rate 0.01, seen as a difference.

`best` takes, by the truth, the best of the candidates that the robust attack chooses from without
it; `gap` is the largest distance of the choice to it in one case. Floors: one public colour,
and under matching flat patches. `--more` adds the points of the figure's curves.

`--map` draws noise and pruning as the defenses `noise` and `pruning` add them (relative to each
tensor), learnable and frozen positions: what one ladder of S nominal seconds hands back, and of its
rungs the better robust form (by the truth) and `map`; and gradient matching (`inverting`, 200
iterations). Each case adds a line to the file ROWS as it is done, and the figure is of the medians
of all lines there; `--images 0` draws what is there. `--crop 16` takes the middle of images and
position grid: a quarter of the tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitguard.attacks.base import Attack
from vitguard.attacks.ladder import Ladder
from vitguard.attacks.ladder import attack as ladder
from vitguard.attacks.position import PositionInversion
from vitguard.attacks.robust import RobustPosition, RobustSpan
from vitguard.attacks.robust import attacks as robust
from vitguard.attacks.span import SpanInversion
from vitguard.core import Guess, Normalization, View
from vitguard.errors import Blocked, NotApplicable
from vitguard.guard import protect
from vitguard.metrics import baseline, psnr
from vitguard.models import build_model, load_checkpoint
from vitguard.registry import parse_attack, parse_stack
from vitguard.threats import CuriousServer

CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
VIT = (
    "vit_tiny_patch16_224:img_size=32,patch_size=4,embed_dim=128,depth=4,num_heads=4,mlp_ratio=2,"
    "num_classes=10"
)
EPSILON = {"a": 1e-5, "b": 1e-6}
TABLE = ("noise 1e-6", "noise 1e-4", "noise 1e-3", "noise 1e-2", "noise 1e-1", "float16",
         "bfloat16", "keep 10 %", "clipping", "5 local steps")  # fmt: skip
MORE = ("noise 1e-5", "keep 50 %", "keep 20 %", "keep 2 %", "1 local steps", "2 local steps",
        "10 local steps")  # fmt: skip
DEFENSES = (*(f"noise:scale={s}" for s in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)),
            *(f"pruning:keep={k}" for k in (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)))  # fmt: skip
POSITIONS = {"learnable": "", "frozen": "positions:kind=frozen+"}
ATTACKS = {"ladder": ("#2b2b2b", "--"), "robust": ("#1f5f99", "-"), "map": ("#b9510d", "-"),
           "matching": ("#7a7a7a", "-")}  # fmt: skip
COLUMNS = ("position", "position-robust", "best", "gap", "span", "span-robust", "best", "gap")


@dataclass(frozen=True)
class Case:
    """One image on one model."""

    model: nn.Module
    pixels: Tensor
    label: Tensor
    seed: int


def main() -> None:
    """Print the table; draw it where a file is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--map", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--crop", type=int, default=32)
    options = parser.parse_args()
    if not os.environ.get("VITGUARD_DATA"):
        sys.exit("Expected VITGUARD_DATA to name the folder with CIFAR-10 and the trained ViTs.")
    cases = list(load_cases(options.first, options.images, options.crop))
    if options.map is not None:
        wanted = [d for d in DEFENSES if not options.only or any(w in d for w in options.only)]
        with options.map.open("a") as rows:
            for row in map_rows(cases, wanted, options.seconds):
                print(*row, sep="\t", file=rows, flush=True)
        if options.figure is not None:
            draw_map(options.figure, options.map)
        return
    floors = [baseline(case.pixels, (4, 4)) for case in cases]
    low, high = (
        float(torch.cat([getattr(f, k) for f in floors]).median()) for k in ("psnr", "thumbnail")
    )
    print(f"{len(cases)} cases, floors {low:.1f} dB one public colour, {high:.1f} dB flat patches")
    print(f"| damage | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|", flush=True)
    table: dict[str, Tensor] = {}
    for damage in TABLE + (MORE if options.more else ()):
        if options.only and not any(word in damage for word in options.only):
            continue
        figures = torch.tensor([figures_of(case, damage) for case in cases])
        table[damage] = row = figures.nanmedian(0).values
        for gap, best in ((3, 2), (7, 6)):
            row[gap] = (figures[:, best] - figures[:, best - 1]).max()
        print(f"| {damage} | {' | '.join(map(cell, row.tolist()))} |", flush=True)
    if options.figure is not None:
        draw(options.figure, table, low)


def cell(value: float) -> str:
    """Return a number with one digit; what did not apply is a dash."""
    return "-" if value != value else f"{value:.1f}"


def load_cases(first: int, count: int, crop: int = 32) -> Iterator[Case]:
    """Yield CIFAR-10 test images, or their middle, on both trained models."""
    folder = Path(os.environ["VITGUARD_DATA"])
    sys.path.insert(0, str(folder))
    from load import cifar10  # type: ignore[import-not-found]

    images, labels = cifar10("test", first + count)
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
    for name, epsilon in EPSILON.items():
        model = build_model(VIT)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = epsilon
        load_checkpoint(model, folder / f"weights/cifar10_vit_{name}.safetensors")
        middle = pixels
        if crop < 32:
            model = cropped(model, crop)
            edge = (32 - crop) // 2
            middle = pixels[..., edge : edge + crop, edge : edge + crop]
        for i in range(first, first + count):
            yield Case(model, middle[i : i + 1], torch.as_tensor(labels[i : i + 1]).long(), i)


def cropped(model: nn.Module, crop: int) -> nn.Module:
    """Return the model for the middle of its images: the middle of its position grid."""
    small = build_model(VIT.replace("img_size=32", f"img_size={crop}"))
    for module, other in zip(small.modules(), model.modules(), strict=True):
        if isinstance(module, nn.LayerNorm):
            module.eps = other.eps  # type: ignore[union-attr]
    state, (edge, side) = model.state_dict(), ((32 - crop) // 8, crop // 4)
    grid = state["pos_embed"][:, 1:].unflatten(1, (8, 8))
    grid = grid[:, edge : edge + side, edge : edge + side].flatten(1, 2)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid], 1)
    small.load_state_dict(state)
    return small


def figures_of(case: Case, damage: str) -> list[float]:
    """Return PSNR of plain, robust and best candidate (and room for the gap) for both attacks."""
    learnable, fixed = (observe(case, damage, s) for s in ("none", "positions:kind=frozen"))
    made: list[float] = []
    for plain, strong, view in (
        (PositionInversion(), RobustPosition(seconds=60), learnable),
        (SpanInversion(), RobustSpan(seconds=60), fixed),
    ):
        best: list[float] = []
        made.append(quality(plain, view, case.pixels))
        made.append(watched(strong, view, case.pixels, best.append))
        made += [max(best, default=float("nan")), 0.0]
    return made


def quality(attack: Attack, view: View, truth: Tensor) -> float:
    """Return the PSNR of an attack; NaN where it does not apply."""
    try:
        guess = attack.run(view, torch.Generator().manual_seed(0))
    except (NotApplicable, Blocked):
        return float("nan")
    return float(psnr(guess.images.cpu(), truth))


def watched(attack: Attack, view: View, truth: Tensor, keep: Callable[[float], None]) -> float:
    """Return the PSNR of a robust attack, and tell `keep` that of every candidate."""

    offer = robust.Choice.offer

    def compared(
        choice: robust.Choice, candidates: Iterable[robust.Candidate]
    ) -> Iterator[robust.Candidate]:
        for settings, patches in candidates:
            images = view.normalization.invert(choice.anatomy.unpatchify(patches[None]))
            if bool(images.isfinite().all()):
                keep(float(psnr(images.clamp(0, 1), truth)))
            yield settings, patches

    robust.Choice.offer = lambda self, c: offer(self, compared(self, c))  # type: ignore[method-assign]
    try:
        return quality(attack, view, truth)
    finally:
        robust.Choice.offer = offer  # type: ignore[method-assign]


def observe(case: Case, damage: str, stack: str) -> View:
    """Return what a curious server sees of the damaged update."""
    generator = torch.Generator().manual_seed(case.seed)
    guard = protect(case.model.train(), parse_stack(stack), generator=generator)
    word, *amount = damage.split()
    how = {"learning_rate": 0.01, "local_steps": int(word)} if "steps" in damage else {}
    update = guard.update(CIFAR.apply(case.pixels), case.label, **how)
    view = CuriousServer(()).view(guard, update, CIFAR)
    guard.remove()
    whole = torch.cat([t.flatten() for t in update.tensors.values()]).double()
    level = float(whole.square().mean().sqrt())

    def spoil(tensor: Tensor) -> Tensor:
        if word == "noise":
            noise = torch.randn(tensor.shape, generator=generator)
            return tensor + float(amount[0]) * level * noise
        if word in ("float16", "bfloat16"):
            return tensor.to(getattr(torch, word)).float()
        if word == "clipping":
            return tensor * min(1.0, 0.1 / float(whole.norm()))
        if word == "keep":
            dropped = max(1, int((1 - float(amount[0]) / 100) * tensor.numel()))
            bound = tensor.abs().flatten().kthvalue(dropped).values
            return torch.where(tensor.abs() > bound, tensor, 0.0)
        return tensor

    tensors = {name: spoil(tensor) for name, tensor in update.tensors.items()}
    return replace(view, update=replace(update, tensors=tensors))


def map_rows(
    cases: list[Case], defenses: list[str], seconds: float
) -> Iterator[tuple[object, ...]]:
    """Yield positions, defense, image, both floors, PSNR by `ATTACKS`, what became of the rungs."""
    for case in cases:
        floor = baseline(case.pixels, (4, 4))
        for defense in defenses:
            for positions, before in POSITIONS.items():
                view = observe(case, "none 0", before + defense)
                guess, rungs = climbed(Ladder(seconds=seconds), view)
                made = {n: float(psnr(g.images.cpu(), case.pixels)) for n, g in rungs.items()}
                robust = max(made[n] for n in ("position-robust", "span-robust") if n in made)
                matched = quality(parse_attack("inverting", fast=True), view, case.pixels)
                figures = (float(psnr(guess.images.cpu(), case.pixels)),
                           robust, made.get("map", float("nan")), matched)  # fmt: skip
                told = ", ".join(f"{n} {said}" for n, said in guess.details["outcomes"].items())
                yield (positions, defense, case.seed, f"{float(floor.psnr):.2f}",
                       f"{float(floor.thumbnail):.2f}", *(f"{v:.2f}" for v in figures),
                       f"{guess.details['rung']}; {told}")  # fmt: skip


def climbed(attack: Ladder, view: View) -> tuple[Guess, dict[str, Guess]]:
    """Return what the ladder hands back, and the guesses of its rungs."""
    rungs: dict[str, Guess] = {}
    best = ladder._Climb.best

    def kept(climb: ladder._Climb) -> Guess:
        rungs.update(climb.guesses)
        return best(climb)

    ladder._Climb.best = kept  # type: ignore[method-assign]
    try:
        return attack.run(view, torch.Generator().manual_seed(0)), rungs
    finally:
        ladder._Climb.best = best  # type: ignore[method-assign]


def draw_map(path: Path, rows: Path) -> None:
    """Draw noise and pruning, learnable and frozen positions side by side; print the medians."""
    lines = [line.split("\t") for line in rows.read_text().splitlines()]
    floors = torch.tensor([[float(v) for v in line[3:5]] for line in lines]).median(0).values
    table: dict[tuple[str, str], Tensor] = {}
    for key in sorted({(line[0], line[1]) for line in lines}):
        found = [[float(v) for v in line[5:9]] for line in lines if (line[0], line[1]) == key]
        table[key] = values = torch.tensor(found).nanquantile(0.5, dim=0)
        more = torch.tensor([row[2] - row[1] for row in found]).nanquantile(0.5)
        print(f"| {' | '.join(key)} | {' | '.join(map(cell, [*values.tolist(), float(more)]))} |"
              f" {len(found)} cases")  # fmt: skip
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), sharey=True)
    words = (("noise", "noise, relative to each tensor"), ("pruning", "share of entries kept"))
    places = [(w, title, p) for w, title in words for p in POSITIONS]
    for axis, (word, title, positions) in zip(axes, places, strict=True):
        points = sorted((float(d.split("=")[1]), d) for p, d in table if p == positions
                        and d.startswith(word))  # fmt: skip
        ticks = [x for x, _ in points]
        for index, (name, (colour, style)) in enumerate(ATTACKS.items()):
            values = [float(table[positions, d][index]) for _, d in points]
            axis.plot(ticks, values, f"o{style}", color=colour, markersize=3.5, label=name)
        for floor, style, name in zip(floors, ":-", ("public colour", "thumbnail"), strict=True):
            axis.axhline(float(floor), color="0.5", linewidth=0.8, linestyle=style, label=name)
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel(title)
        axis.set_title(f"{positions} positions", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("PSNR in dB, median")
    axes[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw(path: Path, table: dict[str, Tensor], floor: float) -> None:
    """Draw noise, pruning and local steps as curves, rounding and clipping as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {"position": 0, "position-robust": 1, "span": 4, "span-robust": 5}
    colours = {"position": "#7fb2d9", "position-robust": "#1f5f99",
               "span": "#f0b27a", "span-robust": "#b9510d"}  # fmt: skip
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.6), sharey=True, width_ratios=(4, 3, 3, 3))
    curves = (("noise", "noise, relative to the gradient"), ("keep", "% of entries kept"),
              ("steps", "local SGD steps"))  # fmt: skip
    for axis, (word, title) in zip(axes[:3], curves, strict=True):
        points = sorted((number_in(d), d) for d in table if word in d)
        for name, column in lines.items():
            dashed = "-" if "robust" in name else "--"
            values = [float(table[d][column]) for _, d in points]
            axis.plot([x for x, _ in points], values, f"o{dashed}", color=colours[name],
                      markersize=3.5, label=name)  # fmt: skip
        axis.set_xscale("log")
        ticks = [x for x, _ in points]
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel(title)
    bars = [d for d in ("float16", "bfloat16", "clipping") if d in table]
    for i, (name, column) in enumerate(lines.items()):
        heights = [float(table[d][column].nan_to_num(0)) for d in bars]
        places = [j + 0.2 * i - 0.3 for j in range(len(bars))]
        axes[3].bar(places, heights, 0.18, color=colours[name])
    axes[3].set_xticks(range(len(bars)), bars, fontsize=8)
    for axis in axes:
        axis.axhline(floor, color="0.5", linewidth=0.8, label="one public colour")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("PSNR in dB, median")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=5, loc="upper center", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def number_in(damage: str) -> float:
    """Return the amount in a damage's name."""
    return next(float(w) for w in damage.split() if w[0].isdigit())


if __name__ == "__main__":
    main()
