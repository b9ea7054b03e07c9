"""What the head alone gives away: images from the class-token features that its gradient shows.

    python benchmarks/feature_decoder.py CACHE --out rows.jsonl                 # 5 minutes
    python benchmarks/feature_decoder.py CACHE --model cifar-b --known photos
    python benchmarks/feature_decoder.py CACHE --out rows.jsonl --evidence cells.jsonl  # as cells
    python benchmarks/feature_decoder.py CACHE --batches                        # half a minute more
    python benchmarks/feature_decoder.py CACHE --picture docs/images/feature-decoder.png

The stack is `frozen-stem:trained=0`. The adversary knows the frozen model, and has public images
of the victims' kind (CIFAR-10's training images), or crops of a hundred photos of other things. Of
each victim, a test image by itself, it takes the gradient of the head and divides dL/dW by dL/db,
which is the class token's features. Then it guesses the image:

- `mean`: of the public images, without the gradient: what any guess must improve on;
- `random`: a public image drawn blindly, to compare with:
- `nearest`: the public image with the most similar features;
- `linear`, `decoder`: regressions from features to pixels, on the public images; a linear one, and
  two hidden layers, stopped where held-out public images say so;
- `descent`: pixels whose features are the victim's, under a total-variation prior, from four starts
  (decoder, nearest, mean, noise); the one with the smallest objective counts;
- `descent, gaussian`: the same in the principal axes of the public images, under their covariance;
- `luckiest`: of all of these the one nearest to the truth, which no adversary can choose.

With `--batches` it separates the head's gradient of 2, 4 and 8 images into features of each.

All in dB beside the thumbnail (every patch flat in its own colour). `named` is the share of victims
that are nearer to the guess than each of 100 other test images. Features alone name every victim
that is among the candidates: whoever has the image computes its features.

CACHE keeps the features of public images. VITGUARD_DATA is the data folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence import CIFAR, SMALL, SUBJECTS, Subject, folder
from PIL import Image, ImageOps
from scipy.optimize import least_squares, linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from vitguard import data
from vitguard.core import Normalization
from vitguard.evidence import WITHIN, Cell
from vitguard.guard import protect
from vitguard.metrics import patch_psnr, psnr
from vitguard.models import build_model, load_checkpoint
from vitguard.vit import Anatomy

STACK = "frozen-stem:trained=0"
CELLS = {"nearest": "feature-search", "decoder": "feature-decoder", "descent": "feature-descent"}
WEIGHTS = {
    "cifar-a": (CIFAR, "cifar10_vit_a.safetensors"),
    "cifar-b": (CIFAR, "cifar10_vit_b.safetensors"),
    "dinov2": (SMALL, "dinov2_small_timm_fp16.safetensors"),
}
SIDE = 32  # pixels of the images, as they are stored
VICTIMS, OTHERS, DESCENDED = 64, 100, 8
AXES, HIDDEN, BATCH, KEPT = 768, 1024, 256, 0.05
STEPS = 250
RATES = {"descent": 0.02, "descent, gaussian": 0.03}


@dataclass
class Known:
    """What the adversary has: a frozen model, and public images with their features.

    Args:
        read: From pixels in [0, 1], (batch, 3, 32, 32), to features, (batch, width).
        pixels: Public images, bytes, (count, 3, 32, 32).
        features: Theirs, (count, width).
    """

    read: Callable[[Tensor], Tensor]
    pixels: Tensor
    features: Tensor
    mean: Tensor = field(init=False)
    axes: Tensor = field(init=False)
    spread: Tensor = field(init=False)
    centre: Tensor = field(init=False)
    whiten: Tensor = field(init=False)

    def __post_init__(self) -> None:
        flat = self.pixels[:20_000].float().flatten(1) / 255
        self.mean = flat.mean(0)
        power, axes = torch.linalg.eigh((flat - self.mean).T @ (flat - self.mean) / len(flat))
        self.axes = axes[:, -AXES:]
        self.spread = power[-AXES:].clamp_min(1e-8).sqrt()
        self.centre = self.features.mean(0)
        power, turns = torch.linalg.eigh(torch.cov(self.features.T))
        told = power > 1e-4 * power[-1]
        self.whiten = turns[:, told] / power[told].sqrt()

    def white(self, features: Tensor) -> Tensor:
        """Return features in which public images vary alike along every axis."""
        return (features - self.centre) @ self.whiten

    def along(self, pixels: Tensor) -> Tensor:
        """Return pixels in [0, 1] as coordinates along the principal axes."""
        return (pixels.flatten(1) - self.mean) @ self.axes

    def images(self, coordinates: Tensor) -> Tensor:
        return (self.mean + coordinates @ self.axes.T).view(-1, 3, SIDE, SIDE)


def subject(name: str) -> tuple[nn.Module, Normalization]:
    """Return a model in evaluation mode, a head on it, and its normalisation."""
    spec, weights = WEIGHTS[name]
    if name == "cifar-b":
        model = build_model(spec)
        load_checkpoint(model, folder() / "weights" / weights)
        return model.eval(), Subject("cifar", "finetune", spec).normalization(model)
    made = Subject("cifar" if "cifar" in name else name, "finetune", spec, weights)
    model = made.model()
    return model.eval(), made.normalization(model)


def reader(model: nn.Module, normalization: Normalization) -> Callable[[Tensor], Tensor]:
    """Return what computes the features of the class token, as the head reads them."""
    size = Anatomy.of(model).image_size

    def read(pixels: Tensor) -> Tensor:
        if size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size, mode="bicubic").clamp(0, 1)
        whole = model.forward_features(normalization.apply(pixels))
        return model.forward_head(whole, pre_logits=True)

    return read


def public(kind: str, count: int) -> Tensor:
    """Return public images, bytes, (count, 3, 32, 32)."""
    if kind == "cifar":
        return cifar("train", count)[0]
    files = sorted(f for f in (folder() / "photos").iterdir() if f.suffix != ".csv")
    generator = torch.Generator().manual_seed(0)
    photos = [ImageOps.fit(Image.open(f).convert("RGB"), (96, 96)) for f in files]
    large = torch.stack([data.to_pixels(p) for p in photos])
    made = []
    for i in range(count):
        side = int(torch.randint(32, 97, (1,), generator=generator))
        top, left = torch.randint(0, 97 - side, (2,), generator=generator).tolist()
        piece = large[i % len(large)][:, top : top + side, left : left + side]
        small = F.interpolate(piece[None], (SIDE, SIDE), mode="area")[0]
        made.append(small.flip(-1) if i // len(large) % 2 else small)
    return (255 * torch.stack(made)).round().byte()


def cifar(split: str, count: int) -> tuple[Tensor, Tensor]:
    sys.path.insert(0, str(folder()))
    from load import cifar10  # type: ignore[import-not-found]

    images, labels = cifar10(split, count)
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)


def features_of(read: Callable[[Tensor], Tensor], pixels: Tensor, file: Path) -> Tensor:
    """Return the features of byte images, from a file where it has them."""
    if not file.exists():
        with torch.no_grad():
            made = torch.cat([read(p.float() / 255) for p in pixels.split(100)])
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(made, file)
    return torch.load(file, weights_only=True)


def read_from_gradient(
    model: nn.Module, normalization: Normalization, pixels: Tensor, labels: Tensor
) -> Tensor:
    """Return the features that the head's gradient shows of each image by itself."""
    guard = protect(model, STACK)
    size, found = Anatomy.of(model).image_size, []
    for image, label in zip(pixels.split(1), labels.split(1), strict=True):
        if size != (SIDE, SIDE):
            image = F.interpolate(image, size, mode="bicubic").clamp(0, 1)
        seen = guard.update(normalization.apply(image), label).tensors
        assert not [n for n in seen if not n.startswith(("head.", "norm."))], sorted(seen)
        row = seen["head.bias"].abs().argmax()
        found.append(seen["head.weight"][row] / seen["head.bias"][row])
    return torch.stack(found)


def separated(
    weight: Tensor, bias: Tensor, gradient: dict[str, Tensor], labels: Tensor, likely: Tensor
) -> tuple[Tensor, float]:
    """Return the features of each image of a batch, from the gradient of the head alone.

    G = (P - Y)^T F / B has B images in fewer than as many dimensions as there are classes, so that
    the rows of F are combinations of its B leading directions: B^2 unknowns. P = softmax(F W^T + b)
    makes G itself (classes - 1) x B equations for them. Labels are known, as the attack on labels
    reads them or as a guess that the misfit confirms.

    Args:
        weight, bias: Of the head, (classes, width) and (classes,).
        gradient: Of the head, by `weight` and `bias`.
        labels: Of the batch, (batch,).
        likely: Features that public images of each class have on average, (classes, width).

    Returns:
        Features in the order of the labels, (batch, width), and the relative misfit: 1e-5 or less
        says that they are right.
    """
    batch, (classes, _) = len(labels), weight.shape
    w, b, seen, level = (t.double() for t in (weight, bias, gradient["weight"], gradient["bias"]))
    across = torch.linalg.svd(seen, full_matrices=False)[2][: min(batch, classes - 1)]
    named = F.one_hot(labels, classes).double()
    generator = torch.Generator().manual_seed(0)
    best, found = torch.inf, torch.empty(0)

    def misfit(unknown: np.ndarray) -> np.ndarray:
        features = torch.from_numpy(unknown).view(batch, -1) @ across
        wrong = torch.softmax(features @ w.T + b, 1) - named
        made = (wrong.T @ features / batch - seen) @ across.T / seen.norm()
        return torch.cat([made.flatten(), (wrong.mean(0) - level) / level.norm()]).numpy()

    for start in range(10):
        begin = likely.double()[labels]
        if start:
            drawn = torch.randn(begin.shape, generator=generator, dtype=begin.dtype)
            begin = begin + 0.3 * likely.double().std(0) * drawn
        limits: dict[str, float] = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14}
        solved = least_squares(misfit, (begin @ across.T).flatten(), max_nfev=300, **limits)
        if solved.cost < best:
            best, found = float(solved.cost), torch.from_numpy(solved.x).view(batch, -1) @ across
        if best < 1e-11:
            break
    return found, (2 * best) ** 0.5


def batches(
    model: nn.Module, known: Known, public_labels: Tensor, size: int, count: int
) -> None:  # fmt: skip
    """Print how near features of single images come that stood in a batch's head gradient."""
    pixels, labels = cifar("test", size * count)
    head: Any = model.get_submodule("head")
    likely = torch.stack([known.features[: len(public_labels)][public_labels == c].mean(0)
                          for c in range(head.out_features)])  # fmt: skip
    for images, named_ in zip(pixels.split(size), labels.split(size), strict=True):
        images = images.float() / 255
        loss = F.cross_entropy(head(known.read(images)), named_)
        seen = torch.autograd.grad(loss, [head.weight, head.bias])
        values = dict(zip(("weight", "bias"), seen, strict=True))
        found, left = separated(head.weight.detach(), head.bias.detach(), values, named_, likely)
        with torch.no_grad():
            away = torch.cdist(found, known.read(images).double())
        pairs = linear_sum_assignment(away)  # equal labels come in any order
        far = (away[pairs] / found[pairs[0]].norm(dim=1)).max()
        print(f"{size} images: features {far:.1e} away at most, misfit {left:.1e}", flush=True)


def linear(known: Known, white: Tensor) -> Tensor:
    """Return images by ridge regression of pixels on features."""
    inputs = known.white(known.features)
    wanted = known.along(known.pixels.float() / 255)
    gram = inputs.T @ inputs + 1e-3 * len(inputs) * torch.eye(inputs.shape[1])
    return known.images(white @ torch.linalg.solve(gram, inputs.T @ (wanted - wanted.mean(0))))


def decoder(known: Known, white: Tensor, steps: int) -> Tensor:
    """Return images by two hidden layers, as good as held-out public images say they became."""
    torch.manual_seed(0)
    inputs = known.white(known.features)
    wanted = torch.cat([known.along(p.float() / 255) for p in known.pixels.split(5000)])
    held = max(int(KEPT * len(inputs)), 1)
    net = nn.Sequential(
        nn.Linear(inputs.shape[1], HIDDEN), nn.GELU(), nn.Dropout(0.1),
        nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Dropout(0.1), nn.Linear(HIDDEN, AXES),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
    best, guess = torch.inf, torch.empty(0)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps) + 1e-5
        chosen = torch.randint(len(inputs) - held, (BATCH,))
        loss = (net(inputs[chosen]) - wanted[chosen]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0 or step == steps:
            with torch.no_grad():
                net.eval()
                away = float((net(inputs[-held:]) - wanted[-held:]).square().sum(1).mean())
                if away < best:
                    best, guess = away, known.images(net(white))
                net.train()
    return guess


def descent(known: Known, white: Tensor, starts: dict[str, Tensor], kind: str) -> Tensor:
    """Return, of each victim and start, pixels whose features are the victim's.

    Returns:
        (starts, victims, 3, 32, 32), and the objective of each as the last value of the run.
    """
    begin = torch.cat(list(starts.values()))
    wanted = white.repeat(len(starts), 1)
    free = kind == "descent"
    unknown = begin.clone() if free else known.along(begin) / known.spread
    unknown.requires_grad_()
    optimizer = torch.optim.Adam([unknown])
    pixels = begin
    for step in range(STEPS):
        left = 1 - step / STEPS
        optimizer.param_groups[0]["lr"] = RATES[kind] * left + 1e-4
        pixels = unknown if free else known.images(unknown * known.spread)
        misfit = (known.white(known.read(pixels)) - wanted).square().mean(1)
        if free:
            outside = (pixels - pixels.clamp(0, 1)).square().flatten(1).mean(1)
            prior = 2 * variation(pixels) + 10 * outside
        else:
            prior = 0.3 * unknown.square().mean(1)
        optimizer.zero_grad()
        (misfit + left * prior).sum().backward()
        optimizer.step()
    return pixels.detach().clamp(0, 1).view(len(starts), -1, 3, SIDE, SIDE)


def variation(pixels: Tensor) -> Tensor:
    down = (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().flatten(1).mean(1)
    across = (pixels[..., 1:] - pixels[..., :-1]).abs().flatten(1).mean(1)
    return down + across


def misfits(known: Known, white: Tensor, pixels: Tensor) -> Tensor:
    """Return the relative distance of the features of each guess, (starts, victims)."""
    with torch.no_grad():
        found = torch.stack([known.white(known.read(p)) for p in pixels])
    return (found - white).norm(dim=2) / white.norm(dim=1)


def named(guess: Tensor, truth: Tensor, others: Tensor) -> Tensor:
    """Return which truths are nearer to their guess than every other image."""
    own = (guess - truth).flatten(1).norm(dim=1)
    return own < torch.cdist(guess.flatten(1), others.flatten(1)).amin(1)


@dataclass(frozen=True)
class Row:
    """One way to guess.

    Args:
        model, known, public: The frozen model, what public images there were, and how many.
        way: See above.
        victims: How many images.
        mean, best: dB, over the victims.
        matched: dB of the best, patches matched, as the evidence table has it.
        above, above_matched: dB of the best from its own thumbnail, as it is and patches matched.
            Patches of any photo, put where they fit best, may pass the thumbnail of a smooth image:
            `random` says how far.
        named: Share of victims that the guess names among 101.
        misfit: Relative distance of the features, mean; None where nothing was fitted.
    """

    model: str
    known: str
    public: int
    way: str
    victims: int
    mean: float
    best: float
    matched: float
    above: float
    above_matched: float
    named: float
    misfit: float | None = None


def cell(row: Row) -> Cell:
    """Return what a way came to as a cell of the evidence table: it fell, or it shows nothing."""
    fell = row.above_matched > WITHIN
    return Cell(
        STACK, SUBJECTS[0].name, "finetune", 1, "natural", CELLS[row.way], row.matched,
        row.above_matched, "leaks" if fell else "inconclusive",
        note=f"the best of {row.victims} victims, {row.public} public images of the same kind",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--model", choices=WEIGHTS, default="cifar-a")
    parser.add_argument("--known", choices=("cifar", "photos"), default="cifar")
    parser.add_argument("--public", type=int, default=20_000, help="public images")
    parser.add_argument("--steps", type=int, default=1000, help="of the decoder's training")
    parser.add_argument("--no-descent", action="store_true", help="leave the descent out")
    parser.add_argument("--batches", action="store_true", help="separate batches, and end")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--evidence", type=Path, help="rows of evidence.py, to add cells to")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    began = time.process_time()
    model, normalization = subject(options.model)
    read = reader(model, normalization)
    pixels = public(options.known, options.public)
    file = options.cache / f"{options.model}-{options.known}-{len(pixels)}.pt"
    known = Known(read, pixels, features_of(read, pixels, file))
    bytes_, labels = cifar("test", VICTIMS + OTHERS)
    tests = bytes_.float() / 255
    truth, others = tests[:VICTIMS], tests[VICTIMS:]
    shown = data.sample_images((SIDE, SIDE)).pixels  # for the picture alone
    marked = torch.cat([labels[:VICTIMS], torch.zeros(len(shown)).long()])
    both = read_from_gradient(model, normalization, torch.cat([truth, shown]), marked)
    seen, extra = both[:VICTIMS], known.white(both[VICTIMS:])
    if options.batches and options.known == "cifar":
        named_ = cifar("train", min(2000, len(pixels)))[1]
        for parameter in model.get_submodule("head").parameters():
            parameter.requires_grad_(True)
        for size in (2, 4, 8):
            batches(model, known, named_, size, 4)
        return
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    exact = float((seen - read(truth)).norm() / seen.norm())
    print(f"features from the gradient: {exact:.1e} away; {time.process_time() - began:.0f} s")
    white = known.white(seen)

    ways = {"mean": known.mean.view(1, 3, SIDE, SIDE).expand_as(truth)}
    drawn = torch.randint(len(pixels), (VICTIMS,), generator=torch.Generator().manual_seed(1))
    ways["random"] = known.pixels[drawn].float() / 255
    nearest = torch.cdist(white, known.white(known.features)).argmin(1)
    ways["nearest"] = known.pixels[nearest].float() / 255
    ways["linear"] = linear(known, white)
    guesses = decoder(known, torch.cat([white, extra]), options.steps).clamp(0, 1)
    ways["decoder"], guesses = guesses[:VICTIMS], guesses[VICTIMS:]
    print(f"decoder trained; {time.process_time() - began:.0f} s", flush=True)
    ways = {k: v.clamp(0, 1) for k, v in ways.items()}
    fitted: dict[str, Tensor] = {}
    if not options.no_descent:
        torch.manual_seed(0)
        few = {k: ways[k][:DESCENDED] for k in ("decoder", "nearest", "mean")}
        few["noise"] = known.images(torch.randn(DESCENDED, AXES) * known.spread).clamp(0, 1)
        tried = list(few.values())
        for kind in RATES:
            each = descent(known, white[:DESCENDED], few, kind)
            away = misfits(known, white[:DESCENDED], each)
            ways[kind] = each[away.argmin(0), torch.arange(DESCENDED)]
            fitted[kind] = away.amin(0)
            tried += list(each)
        whole = torch.stack([*(ways[k][:DESCENDED] for k in ("linear",)), *tried])
        score = torch.stack([psnr(one, truth[:DESCENDED]) for one in whole])
        ways["luckiest"] = whole[score.argmax(0), torch.arange(DESCENDED)]
    patch = Anatomy.of(model).patch_size
    side = (patch[0] * SIDE // Anatomy.of(model).image_size[0],) * 2
    flat = flat_of(truth, side)
    rows = []
    for way, guess in {**ways, "thumbnail": flat}.items():
        own, floor = truth[: len(guess)], psnr(flat, truth)[: len(guess)]
        matched = patch_psnr(guess, own, side)
        rows.append(Row(
            options.model, options.known, len(pixels), way, len(guess),
            float(psnr(guess, own).mean()), float(psnr(guess, own).max()), float(matched.max()),
            float((psnr(guess, own) - floor).max()), float((matched - floor).max()),
            float(named(guess, own, others).double().mean()),
            float(fitted[way].mean()) if way in fitted else None,
        ))  # fmt: skip
        print(rows[-1], flush=True)
    print(f"{time.process_time() - began:.0f} s of processor time")
    if options.out:
        with options.out.open("a") as file_:
            file_.writelines(json.dumps(asdict(r)) + "\n" for r in rows)
    if options.evidence and (options.model, options.known) == ("cifar-a", "cifar"):
        with options.evidence.open("a") as file_:
            cells = [asdict(cell(r)) for r in rows if r.way in CELLS]
            file_.writelines(json.dumps({"kind": "cell", **c}) + "\n" for c in cells)
    if options.picture:
        draw(
            flat_of(shown, side),
            {"truth": shown, **pictured(known, extra, guesses)},
            options.picture,
        )


def pictured(known: Known, white: Tensor, decoded: Tensor) -> dict[str, Tensor]:
    """Return what is made of the sample photos; no image of a data set is drawn."""
    torch.manual_seed(0)
    noise = known.images(torch.randn(len(white), AXES) * known.spread).clamp(0, 1)
    mean = known.mean.view(1, 3, SIDE, SIDE).expand_as(decoded)
    starts, made = {"decoder": decoded, "mean": mean, "noise": noise}, {"decoder": decoded}
    for kind in RATES:
        each = descent(known, white, starts, kind)
        made[kind] = each[misfits(known, white, each).argmin(0), torch.arange(len(white))]
    return made


def flat_of(images: Tensor, side: tuple[int, int]) -> Tensor:
    """Return the thumbnail: every patch flat in its own colour."""
    return F.interpolate(F.avg_pool2d(images, side), scale_factor=side[0])


def draw(thumbnail: Tensor, made: dict[str, Tensor], path: Path) -> None:
    """Draw photos beside what was made of their features."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = {"truth": made["truth"], "thumbnail": thumbnail, **made}
    count = len(thumbnail)
    figure, axes = plt.subplots(len(lines), count, figsize=(1.05 * count, 1.05 * len(lines)))
    for line, (name, images) in zip(axes, lines.items(), strict=True):
        for place, image in zip(line, images, strict=True):
            place.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
        line[0].set_ylabel(name.replace(", ", ",\n"), fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
