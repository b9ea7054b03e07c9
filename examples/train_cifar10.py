"""Train a small Vision Transformer with any stack of defenses, and resume exactly.

    python examples/train_cifar10.py --data DATA --defense positions:kind=sincos+shuffle:ratio=0.7

DATA is a folder with `cifar10.npz`, or class folders of images, or `train/` and `test/` with class
folders. Without --data the folder that VITGUARD_DATA names is used. With --out, `checkpoint.pt` is
written after each epoch (--resume continues from it, to the same result), and `seen.png` shows
images and what the model saw of them. --tensorboard writes scalars, the same pictures, and images
beside themselves with 70 % of their patches shuffled.
"""

from __future__ import annotations

import argparse
import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from vitguard.data import load_images
from vitguard.errors import InputError, expected
from vitguard.models import find_device
from vitguard.registry import parse_stack, stack_name
from vitguard.tracking import TensorBoard, what_the_model_saw

NORMALIZATION = vg.Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@dataclass(frozen=True)
class Data:
    """Pixels as uint8 (images, 3, height, width) with class indices."""

    train: TensorDataset
    test: TensorDataset
    classes: int


def load_data(folder: str | None, *, images: int | None, image_size: int) -> Data:
    """Read CIFAR-10's arrays, or class folders; with no test folder every tenth image is held out.

    Raises:
        InputError: No folder was named, or there is nothing in it to train on.
    """
    folder = folder or os.environ.get("VITGUARD_DATA")
    if not folder or not Path(folder).is_dir():
        raise expected("a data folder", repr(folder), "Give --data, or set VITGUARD_DATA.")
    path = Path(folder)
    if (path / "cifar10.npz").is_file():
        with np.load(path / "cifar10.npz") as arrays:
            train = _cifar(arrays, "train", images, image_size)
            test = _cifar(arrays, "test", 2000, image_size)
    elif (path / "train").is_dir():
        tests = next((path / n for n in ("test", "val") if (path / n).is_dir()), path / "train")
        train, test = (_folder(p, images, image_size) for p in (path / "train", tests))
    else:
        pixels, labels = _folder(path, images, image_size)
        held = torch.arange(len(labels)) % 10 == 9
        train, test = (pixels[~held], labels[~held]), (pixels[held], labels[held])
    return Data(TensorDataset(*train), TensorDataset(*test), int(train[1].max()) + 1)


def _cifar(arrays: Any, split: str, count: int | None, size: int) -> tuple[Tensor, Tensor]:
    data, offsets, labels = (arrays[f"{split}_{part}"] for part in ("jpeg", "off", "y"))
    count = min(count or len(labels), len(labels))
    decoded = [
        np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())))
        for i in range(count)
    ]
    pixels = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return pixels, torch.from_numpy(labels[:count].astype(np.int64))


def _folder(path: Path, count: int | None, size: int) -> tuple[Tensor, Tensor]:
    found = load_images(path, (size, size))
    if found.labels is None:
        raise expected("class folders with images", f"images without classes in {path}")
    # every class keeps its share when only some of the images are taken
    some = torch.linspace(0, len(found) - 1, min(count or len(found), len(found))).long()
    return (found.pixels[some] * 255).round().to(torch.uint8), found.labels[some]


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and shift each by up to an eighth of its size."""
    batch, _, height, width = pixels.shape
    reach = max(1, height // 8)
    flip = torch.rand(batch, generator=generator) < 0.5
    down, across = torch.randint(0, 2 * reach + 1, (2, batch), generator=generator)
    padded = F.pad(pixels, (reach,) * 4, mode="reflect")
    rows = down[:, None] + torch.arange(height)
    columns = across[:, None] + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    moved = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def mixed(
    images: Tensor, labels: Tensor, classes: int, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return images mixed with others of the batch, and their label probabilities (mixup)."""
    share = torch.from_numpy(
        np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator))).beta(
            alpha, alpha, len(images)
        )
    ).to(images)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    target = F.one_hot(labels, classes).to(images.dtype)
    a = share[:, None, None, None]
    return a * images + (1 - a) * images[order], share[:, None] * target + (
        1 - share[:, None]
    ) * target[order]


def build(options: argparse.Namespace, classes: int) -> torch.nn.Module:
    """Return a timm ViT of the options' size."""
    return timm.models.vision_transformer.VisionTransformer(
        img_size=options.image_size, patch_size=options.patch_size, embed_dim=options.width,
        depth=options.depth, num_heads=max(1, options.width // 32), mlp_ratio=2,
        num_classes=classes,
    )  # fmt: skip


class Training:
    """One training run: model, guard, optimizer, schedule, and the generators of its order."""

    def __init__(self, options: argparse.Namespace, data: Data) -> None:
        self.options, self.data = options, data
        self.device = find_device(options.device)
        torch.manual_seed(options.seed)
        self.model = build(options, data.classes).to(self.device)
        self.order = torch.Generator().manual_seed(options.seed + 1)
        secret = torch.Generator().manual_seed(options.seed + 2) if options.repeatable else None
        stack = parse_stack(options.defense)
        private = any(isinstance(d, vg.DifferentialPrivacy) for d in stack)
        if private and options.mixup:
            raise expected(
                "--mixup 0 with privacy", options.mixup,
                "A mixed image holds two records, and clipping bounds the influence of one.",
            )  # fmt: skip
        if private and options.amp and self.device.type == "cuda":
            raise expected(
                "no --amp with privacy", "--amp",
                "Its float16 needs a gradient scaler, which clipping cannot have.",
            )  # fmt: skip
        self.guard = vg.protect(self.model, stack, generator=secret)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        self.loader: Any = DataLoader(
            data.train, min(options.batch_size, len(data.train)), shuffle=True, drop_last=True,
            generator=self.order,
        )  # fmt: skip
        # differential privacy puts its own optimizer and loader in their place
        self.optimizer, self.loader = self.guard.prepare(self.optimizer, self.loader)
        self.scaler = torch.amp.GradScaler(enabled=options.amp and self.device.type == "cuda")
        self.steps = options.epochs * len(self.loader)
        self.step = self.epoch = 0

    def run(self, board: TensorBoard | None = None, *, quiet: bool = False) -> float:
        """Train until the last epoch and return the accuracy on the test images."""
        out = Path(self.options.out) if self.options.out else None
        until = min(self.options.epochs, self.options.stop_after or self.options.epochs)
        accuracy = self.accuracy() if self.epoch >= until else 0.0
        console = Console(stderr=True, quiet=quiet)
        with Progress(console=console, disable=quiet) as progress:
            bar = progress.add_task("training", total=self.steps, completed=self.step)
            while self.epoch < until:
                for count, (losses, images) in enumerate(self.one_epoch()):
                    text = "  ".join(f"{k} {v:.3f}" for k, v in losses.items())
                    progress.update(
                        bar, completed=self.step, description=f"epoch {self.epoch} {text}"
                    )
                    if board is not None and count % 10 == 0:
                        self.write(board, losses, images if count == 0 else None)
                    if out is not None and count == 0:
                        self.save_seen(images, out / "seen.png")
                self.epoch += 1
                accuracy = self.accuracy()
                if board is not None:
                    values = {"test accuracy": accuracy}
                    board.training(self.guard, step=self.step, losses={}, values=values)
                console.print(
                    f"epoch {self.epoch}: {100 * accuracy:.1f} % of the test images right"
                )
                if out is not None:
                    self.save(out / "checkpoint.pt")
        return accuracy

    def write(self, board: TensorBoard, losses: dict[str, float], images: Tensor | None) -> None:
        """Write scalars; with images also what the model saw, and what a shuffle of 70 % does."""
        how: Any = {"step": self.step, "normalization": NORMALIZATION}
        values = {"learning rate": self.optimizer.param_groups[0]["lr"]}
        board.training(self.guard, losses=losses, values=values, images=images, **how)
        if images is not None:
            board.shuffle_figure(self.guard, images, ratio=0.7, **how)

    def one_epoch(self) -> Iterator[tuple[dict[str, float], Tensor]]:
        """Train one epoch; yield the losses and the images of each step."""
        self.model.train()
        options = self.options
        for pixels, labels in self.loader:
            pixels = pixels.float() / 255
            if not options.no_augment:
                pixels = augment(pixels, self.order)
            images = NORMALIZATION.apply(pixels).to(self.device)
            target = labels.to(self.device)
            if options.mixup:
                images, target = mixed(images, target, self.data.classes, options.mixup, self.order)
            for group in self.optimizer.param_groups:
                group["lr"] = options.lr * self.rate()
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type) if options.amp else nullcontext():
                task = F.cross_entropy(self.model(images), target)
                extra = self.guard.auxiliary_loss()
            self.scaler.scale(task + extra).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if not getattr(self.loader, "ends_step", True):
                continue  # under privacy a large batch may come in pieces: one step for all
            self.step += 1
            losses = {"task": task.item()}
            if extra.requires_grad:
                losses["auxiliary"] = extra.item()
            yield losses, images.detach()

    def rate(self) -> float:
        """Return the learning rate's factor: linear over a tenth of the steps, then a cosine."""
        warm = max(1, self.steps // 10)
        if self.step < warm:
            return (self.step + 1) / warm
        done = (self.step - warm) / max(1, self.steps - warm)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the share of test images that the model, in eval mode, gets right."""
        self.model.eval()
        right = 0
        for pixels, labels in DataLoader(self.data.test, 500):
            images = NORMALIZATION.apply(pixels.float() / 255).to(self.device)
            right += int((self.model(images).argmax(1).cpu() == labels).sum())
        return right / len(self.data.test)

    def save_seen(self, images: Tensor, path: Path) -> None:
        """Write eight images, and below each what the model saw of it. It shows training data."""
        seen = what_the_model_saw(self.guard, images)
        rows = torch.stack([images[:8], seen[:8]]).cpu()
        pixels = NORMALIZATION.invert(rows).clamp(0, 1)
        sheet = torch.cat([torch.cat(list(row), dim=-1) for row in pixels], dim=-2)
        picture = Image.fromarray((sheet.permute(1, 2, 0).numpy() * 255).round().astype("uint8"))
        scale = max(1, 96 // self.options.image_size)
        picture.resize(
            (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
        ).save(path)

    def save(self, path: Path) -> None:
        """Write all that the next epoch depends on, whole or not at all."""
        state = {
            "defense": stack_name(self.guard.defenses),
            "model": self.model.state_dict(),
            "guard": self.guard.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "epoch": self.epoch,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Continue where `save` left off.

        Raises:
            InputError: There is no checkpoint, or it is one of another model or defense.
        """
        if not path.is_file():
            raise expected("a checkpoint to resume from", f"no file at {path}")
        defense = stack_name(self.guard.defenses)
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            if state["defense"] != defense:
                raise expected(f"--defense {state['defense']}, as before", defense)
            self.model.load_state_dict(state["model"])
            self.guard.load_state_dict(state["guard"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.order.set_state(state["order"])
            torch.set_rng_state(state["random"])
            self.step, self.epoch = state["step"], state["epoch"]
        except InputError:
            raise
        except Exception as error:  # what torch raises depends on what differs
            raise expected(
                "a checkpoint of this run", f"{path} ({type(error).__name__})",
                "Resume with the data and options of the first run, or start anew with another "
                "--out.",
            ) from error  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--data", help="a folder; VITGUARD_DATA by default")
    add("--defense", default="none", help="as in `vitguard audit`, such as shuffle:ratio=0.7")
    add("--images", type=int, help="train on so many images; all by default")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--mixup", type=float, default=0.0, help="alpha of mixup's beta distribution; 0 for none")
    add("--no-augment", action="store_true", help="train on the images as they are")
    add("--image-size", type=int, default=32)
    add("--patch-size", type=int, default=4)
    add("--width", type=int, default=128)
    add("--depth", type=int, default=4)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action="store_true", help="mixed precision")
    add("--out", help="a folder for checkpoint.pt and seen.png")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--stop-after", type=int, help="stop after so many epochs, as an interruption would")
    add("--tensorboard", help="a folder for TensorBoard")
    add("--seed", type=int, default=0)
    add("--repeatable", action="store_true", help="derive the secret draws from --seed: for tests")
    return made


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, and return the accuracy on the test images."""
    options = parser().parse_args(arguments)
    data = load_data(options.data, images=options.images, image_size=options.image_size)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    training = Training(options, data)
    if options.resume:
        training.load(Path(options.out or ".") / "checkpoint.pt")
    with TensorBoard(options.tensorboard) if options.tensorboard else nullcontext() as board:
        accuracy = training.run(board)
    print(f"accuracy {accuracy:.4f} after {training.step} steps, defense {options.defense}")
    return accuracy


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
