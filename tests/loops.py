"""Training loops written twice: as people write them around vitguard, and by hand without it.

The reference knows no guard, no private optimizer, no scheduler and no autograd of a batch: one
example at a time through a Vision Transformer written out below, SGD and every learning rate by
their formulas. Only the draws (noise, masks, Poisson samples) are taken from a source of the same
seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from vitguard.draws import Draws

STEPS = 6
RECORDS, BATCH = 24, 6
BATCHES = RECORDS // BATCH
LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01
WIDTH, DEPTH, HEADS, SIDE = 16, 2, 2, 4
SEED = 7  # of every draw of the defenses

Weights = dict[str, Tensor]


def build(dtype: torch.dtype, seed: int = 0) -> Any:
    """A small timm ViT of 16 patches, no parameter at a special value."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=4 * SIDE, patch_size=4, embed_dim=WIDTH, depth=DEPTH,
            num_heads=HEADS, mlp_ratio=2, num_classes=5,
        ).to(dtype)  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def records(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(RECORDS, 3, 4 * SIDE, 4 * SIDE, generator=generator).to(dtype)
    return images, torch.randint(0, 5, (RECORDS,), generator=generator)


# the model, one image at a time


def tokens_of(w: Weights, image: Tensor) -> Tensor:
    """The patch embedding of one image, (patches, width)."""
    kernel = w["patch_embed.proj.weight"].flatten(1)
    rows = []
    for row in range(SIDE):
        for column in range(SIDE):
            patch = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            rows.append(kernel @ patch.flatten() + w["patch_embed.proj.bias"])
    return torch.stack(rows)


def outputs_of(w: Weights, image: Tensor, shuffle: dict[int, int] | None = None) -> Tensor:
    """The last block's output, (1 + patches, width).

    Args:
        shuffle: Which patch goes to a masked slot, by slot.
    """
    patches, positions = tokens_of(w, image), w["pos_embed"][0]
    sequence = [w["cls_token"][0, 0] + positions[0]]
    for slot in range(SIDE * SIDE):
        if shuffle is not None and slot in shuffle:
            sequence.append(patches[shuffle[slot]] + w["vitguard.shuffle.unknown"][0])
        else:
            sequence.append(patches[slot] + positions[1 + slot])
    x = torch.stack(sequence)
    for i in range(DEPTH):
        x = x + _attention(w, f"blocks.{i}.attn", _norm(w, f"blocks.{i}.norm1", x))
        hidden = F.gelu(_linear(w, f"blocks.{i}.mlp.fc1", _norm(w, f"blocks.{i}.norm2", x)))
        x = x + _linear(w, f"blocks.{i}.mlp.fc2", hidden)
    return x


def logits_of(w: Weights, outputs: Tensor) -> Tensor:
    return _linear(w, "head", _norm(w, "norm", outputs)[0])


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def _attention(w: Weights, name: str, x: Tensor) -> Tensor:
    q, k, v = _linear(w, f"{name}.qkv", x).chunk(3, dim=-1)
    size, heads = WIDTH // HEADS, []
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        heads.append(scores.softmax(-1) @ v[:, part])
    return _linear(w, f"{name}.proj", torch.cat(heads, dim=-1))


def localization_of(w: Weights, outputs: Tensor, shuffle: dict[int, int], weight: float) -> Tensor:
    """The weighted localization loss of one image: mean L1 error over the patches that stayed."""
    errors = []
    for slot in range(SIDE * SIDE):
        if slot not in shuffle:
            vector = F.layer_norm(outputs[1 + slot], (WIDTH,))
            predicted = _linear(w, "vitguard.shuffle.head.layers.0", vector)
            row, column = slot // SIDE / (SIDE - 1), slot % SIDE / (SIDE - 1)
            errors.append((predicted[0] - row).abs() + (predicted[1] - column).abs())
    return weight * sum(errors) / len(errors)


# learning rates by their formulas: (rate, momentum) of step k


def constant(k: int) -> tuple[float, float]:
    return LR, MOMENTUM


def hyperbola(k: int) -> tuple[float, float]:
    return LR / (k + 1), MOMENTUM


def triangle(k: int) -> tuple[float, float]:
    """CyclicLR from 0.01 to 0.1 with 2 steps up; the momentum goes from 0.9 down to 0.8."""
    height = 1 - abs(k / 2 - 2 * math.floor(1 + k / 4) + 1)
    return 0.01 + 0.09 * max(0.0, height), 0.9 - 0.1 * max(0.0, height)


def one_cycle(k: int) -> tuple[float, float]:
    """OneCycleLR to 0.1 over 8 steps: cosines up to 0.3 of them, then down."""
    turn, end = 0.3 * 8 - 1, 8 - 1

    def between(a: float, b: float, share: float) -> float:
        return b + (a - b) * (1 + math.cos(math.pi * share)) / 2

    if k <= turn:
        return between(0.1 / 25, 0.1, k / turn), between(0.95, 0.85, k / turn)
    done = (k - turn) / (end - turn)
    return between(0.1, 0.1 / 25 / 1e4, done), between(0.85, 0.95, done)


def warm_up_then_decay(k: int) -> tuple[float, float]:
    """SequentialLR: linear from a tenth over 2 steps, then a factor of 0.9 a step."""
    return LR * ((0.1, 0.55)[k] if k < 2 else 0.9 ** (k - 2)), MOMENTUM


def restarts(k: int) -> tuple[float, float]:
    """CosineAnnealingWarmRestarts every 2 steps."""
    return LR * (1 + math.cos(math.pi * (k % 2) / 2)) / 2, MOMENTUM


def plateau(k: int) -> tuple[float, float]:
    """ReduceLROnPlateau with patience 1 on a metric that never improves: a tenth every 2 steps."""
    return LR * 0.1 ** max(0, (k - 1) // 2), MOMENTUM


def timm_cosine(k: int) -> tuple[float, float]:
    """timm's CosineLRScheduler over 8 steps after 2 of warm-up from 0.01."""
    if k < 2:
        return 0.01 + k * (LR - 0.01) / 2, MOMENTUM
    return LR * (1 + math.cos(math.pi * k / 8)) / 2, MOMENTUM


# loops and what the defenses add to them


@dataclass(frozen=True)
class Loop:
    """What a training loop does, said once for both sides.

    Args:
        micro: Batches whose gradients are accumulated in one step.
        rate: Learning rate and momentum of step k; `scheduler` is what torch, timm or transformers
            make of it.
        views: Forward passes of one batch; the second sees the mirrored images.
        late: The auxiliary loss is read after both passes, in place of after each.
        ema: Decay of averaged weights, 0 for none.
        frozen: Beginning of the names that are not trained.
        layer_decay: Factor on the rate for each layer further from the head.
        resume: Step after which everything is built anew from a checkpoint, 0 for never.
        tolerance: Largest distance of the weights over the way they went.
    """

    name: str
    micro: int = 1
    rate: Callable[[int], tuple[float, float]] = constant
    scheduler: str = ""
    views: int = 1
    late: bool = False
    ema: float = 0.0
    ema_kind: str = ""
    frozen: str = ""
    layer_decay: float = 1.0
    resume: int = 0
    autocast: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9


LOOPS = [
    Loop("plain"),
    Loop("plain, float32", dtype=torch.float32, tolerance=1e-4),
    Loop("accumulation over 4 batches", micro=4),
    Loop("bfloat16 autocast", autocast=True, dtype=torch.float32, tolerance=3e-2),
    Loop("LambdaLR", rate=hyperbola, scheduler="LambdaLR"),
    Loop("CyclicLR", rate=triangle, scheduler="CyclicLR"),
    Loop("OneCycleLR", rate=one_cycle, scheduler="OneCycleLR"),
    Loop("SequentialLR", rate=warm_up_then_decay, scheduler="SequentialLR"),
    Loop("warm restarts", rate=restarts, scheduler="CosineAnnealingWarmRestarts"),
    Loop("ReduceLROnPlateau", rate=plateau, scheduler="ReduceLROnPlateau"),
    Loop("timm's cosine", rate=timm_cosine, scheduler="timm"),
    Loop("torch's AveragedModel", ema=0.8, ema_kind="torch"),
    Loop("timm's ModelEmaV3", ema=0.8, ema_kind="timm"),
    Loop("frozen stem", frozen="patch_embed"),
    Loop("timm's layer decay", layer_decay=0.5),
    Loop("resumed mid-epoch", rate=hyperbola, scheduler="LambdaLR", resume=3),
    Loop("two forwards in a step", views=2),
    Loop("two forwards, then their losses", views=2, late=True),
]


@dataclass(frozen=True)
class Column:
    """A stack of the matrix, and the numbers its reference needs."""

    name: str
    spec: str
    fixed: bool = False
    shuffled: bool = False
    dal_weight: float = 0.5
    ratio: float = 0.5
    clip: float = 0.0
    noise: float = 0.0
    scale: float = 0.0
    encrypted: bool = False


COLUMNS = [
    Column("positions", "positions:kind=sincos", fixed=True),
    Column(
        "shuffle with DAL", "shuffle:ratio=0.5,mask=uniform,dal=tokens,dal_weight=0.5",
        shuffled=True,
    ),
    Column("privacy", "privacy:noise=0.5,clip=0.8,delta=0.01", clip=0.8, noise=0.5),
    Column(
        "all three",
        "positions:kind=sincos+shuffle:ratio=0.5,mask=uniform,dal=tokens,dal_weight=0.5"
        "+privacy:noise=0.5,clip=0.8,delta=0.01",
        fixed=True, shuffled=True, clip=0.8, noise=0.5,
    ),
    Column("noise", "noise:scale=0.1", scale=0.1),
    Column("encryption", "encryption", encrypted=True),
]  # fmt: skip


def trained_names(w: Weights, loop: Loop, column: Column) -> list[str]:
    return [
        n
        for n in w
        if not (loop.frozen and n.startswith(loop.frozen))
        and not (column.fixed and n == "pos_embed")
    ]


def settings_of(name: str, w: Weights, loop: Loop) -> tuple[float, float]:
    """Factor on the rate, and weight decay, of one parameter."""
    if loop.layer_decay == 1:
        return 1.0, DECAY
    if name.startswith("vitguard"):
        like = "pos_embed" if name.endswith("unknown") else f"head.{name.rpartition('.')[2]}"
        return settings_of(like, w, loop)
    layer = DEPTH + 1
    if name.startswith(("patch_embed", "cls_token", "pos_embed")):
        layer = 0
    if name.startswith("blocks."):
        layer = 1 + int(name.split(".")[1])
    if name.startswith("norm."):  # timm counts it with the last block
        layer = DEPTH
    plain = w[name].dim() < 2 or name in ("cls_token", "pos_embed")
    return loop.layer_decay ** (DEPTH + 1 - layer), 0.0 if plain else DECAY


def _group_of(name: str, names: list[str], w: Weights, loop: Loop) -> int:
    """The group of the optimizer that a parameter is in: they stand as they were met first."""
    settings = [settings_of(n, w, loop) for n in names]
    return settings.index(settings_of(name, w, loop))


# the reference


@dataclass
class Result:
    weights: Weights
    start: Weights
    averaged: Weights = field(default_factory=dict)
    sealed: Weights = field(default_factory=dict)
    spent: list[tuple[float, float, int]] = field(default_factory=list)
    moves: list[dict[int, int]] = field(default_factory=list)
    """Which patch went to each masked slot, image by image: no weight shows it, because the
    masked patches share one embedding and attention does not know their order."""


class Drawn:
    """The draws of a run, in the order in which the loop asks for them."""

    def __init__(self) -> None:
        self.source = Draws(torch.Generator().manual_seed(SEED))

    def shuffles(self, count: int, ratio: float) -> list[dict[int, int]]:
        """For each image: which patch goes to which masked slot."""
        keys, patches = self.source.keys(count), SIDE * SIDE
        chances = self.source.keyed(keys, patches, stream=0)
        orders = self.source.keyed(keys, patches, stream=1)
        made = []
        for i in range(count):
            slots = sorted(np.argsort(chances[i])[: math.floor(ratio * patches)].tolist())
            moved = sorted(slots, key=lambda s, i=i: orders[i][s])
            made.append(dict(zip(slots, moved, strict=True)))
        return made

    def sample(self) -> list[int]:
        """The records of one Poisson batch."""
        words = self.source.words(RECORDS)
        self.source.key()  # names the batch
        return [i for i in range(RECORDS) if int(words[i]) < 2**64 // BATCHES]

    def noised(self, sums: Weights, deviation: float) -> Weights:
        """Gaussian noise on every tensor, rounded to the grid of the release."""
        grid = 2.0 ** math.floor(math.log2(deviation / 1024))
        normal = self.source.normal((sum(t.numel() for t in sums.values()),))
        made, at = {}, 0
        for name, total in sums.items():
            own = normal[at : at + total.numel()].view(total.shape)
            at += total.numel()
            steps = (total.double() / grid + own * (deviation / grid)).round()
            made[name] = (steps * grid).to(total.dtype)
        return made


def reference(loop: Loop, column: Column, *, extras: Weights, fault: str = "") -> Result:
    """Train by hand.

    Args:
        extras: What the defense added to the model, as it started: public.
        fault: A mistake to make on purpose.
    """
    w = {n: p.detach().clone() for n, p in build(loop.dtype).named_parameters()}
    w |= {n: t.clone() for n, t in extras.items()}
    if column.fixed:
        w["pos_embed"] = _sine_cosine().to(loop.dtype)
    images, labels = records(loop.dtype)
    names, drawn = trained_names(w, loop, column), Drawn()
    if column.shuffled:
        drawn.source.words(1)  # the seed of what the localization head starts from
    if fault == "the stem is trained":
        names = [n for n in w if not (column.fixed and n == "pos_embed")]
    start = {n: t.clone() for n, t in w.items()}
    buffers: Weights = {}
    averaged: Weights = {}
    spent, moves = [], []
    for k in range(STEPS):
        sums = {n: torch.zeros_like(w[n]) for n in names}
        for piece in range(loop.micro):
            chosen = _batch(k * loop.micro + piece) if not column.clip else drawn.sample()
            if fault == "only the last batch counts" and piece < loop.micro - 1:
                continue
            share = 1 / loop.micro / (BATCH if column.clip else len(chosen))
            shuffles = [
                drawn.shuffles(len(chosen), column.ratio) if column.shuffled else []
                for _ in range(loop.views)
            ]
            moves += [s for view in shuffles for s in view]
            for j, i in enumerate(chosen):
                gradient = _gradient_of_one(
                    w, names, images[i], int(labels[i]), [s[j] for s in shuffles if s],
                    loop=loop, column=column, fault=fault,
                )  # fmt: skip
                factor = 1.0
                if column.clip and fault != "nothing is clipped":
                    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
                    factor = min(1.0, column.clip / norm)
                for n, g in zip(names, gradient, strict=True):
                    sums[n] += share * factor * g
        if column.clip:
            spent.append((column.noise, 1 / BATCHES, 1))
            ordered = sorted(names, key=lambda n: _group_of(n, names, w, loop))
            sums = {n: BATCH * sums[n] for n in ordered}
            if fault != "no noise":
                sums = drawn.noised(sums, column.noise * column.clip)
            sums = {n: g / BATCH for n, g in sums.items()}
        rate, momentum = loop.rate(0 if fault == "the rate stays" else k)
        if fault == "the optimizer forgets" and k == loop.resume:
            buffers = {}
        for n in names:
            factor, decay = settings_of(n, w, loop)
            if fault == "all layers at one rate":
                factor = 1.0
            step = sums[n] + decay * w[n]
            buffers[n] = step if n not in buffers else momentum * buffers[n] + step
            w[n] = w[n] - rate * factor * buffers[n]
        if loop.ema:
            keep = loop.ema if averaged and fault != "the average follows at once" else 0.0
            if loop.ema_kind == "timm" and not averaged:
                keep, averaged = loop.ema, start
            averaged = {n: keep * averaged.get(n, w[n]) + (1 - keep) * w[n] for n in w}
    result = Result(w, start, averaged)
    result.sealed = _sent(w, start, names, column, drawn, fault)
    result.spent, result.moves = spent, moves
    return result


def _batch(number: int) -> list[int]:
    first = number % BATCHES * BATCH
    return list(range(first, first + BATCH))


def _gradient_of_one(
    w: Weights, names: list[str], image: Tensor, label: int, shuffles: list[dict[int, int]], *,
    loop: Loop, column: Column, fault: str,
) -> list[Tensor]:  # fmt: skip
    leaves = {n: w[n].clone().requires_grad_(n in names) for n in w}
    with torch.autocast("cpu", torch.bfloat16, enabled=loop.autocast):
        loss: Any = 0
        for view in range(loop.views):
            if view and fault == "one view only":
                break
            shuffle = shuffles[view] if shuffles else None
            if fault == "masked patches keep their positions" and shuffle:
                shuffle = dict(list(shuffle.items())[1:])
            seen = image.flip(-1) if view else image
            outputs = outputs_of(leaves, seen, shuffle)
            loss = loss - logits_of(leaves, outputs).log_softmax(-1)[label]
            if shuffle is not None and fault != "no localization":
                loss = loss + localization_of(leaves, outputs, shuffle, column.dal_weight)
    return list(torch.autograd.grad(loss, [leaves[n] for n in names], materialize_grads=True))


def _sent(
    w: Weights, start: Weights, names: list[str], column: Column, drawn: Drawn, fault: str
) -> Weights:
    """What leaves the client: the difference, with noise where the defense adds some.

    Frozen parameters have nothing to send; only encryption, whose messages have no room for them,
    leaves them out.
    """
    fixed = {"pos_embed"} if column.fixed else set(w) - set(names) if column.encrypted else set()
    sent = {n: w[n] - start[n] for n in w if n not in fixed}
    if column.scale and fault != "no noise":
        for n, t in sent.items():
            size = math.sqrt(float(t.double().square().mean()))
            sent[n] = t + column.scale * size * drawn.source.normal(t.shape).to(t.dtype)
    return sent


def _sine_cosine() -> Tensor:
    """MAE's 2-D sine-cosine positions, a zero row for the class token first."""
    rows = [[0.0] * WIDTH]
    for slot in range(SIDE * SIDE):
        y, x = divmod(slot, SIDE)
        waves = [10000 ** (-4 * k / WIDTH) for k in range(WIDTH // 4)]
        rows.append(
            [math.sin(x * v) for v in waves] + [math.cos(x * v) for v in waves]
            + [math.sin(y * v) for v in waves] + [math.cos(y * v) for v in waves]
        )  # fmt: skip
    return torch.tensor([rows], dtype=torch.float64)
