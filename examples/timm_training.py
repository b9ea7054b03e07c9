"""Train a Vision Transformer as timm's script does: EMA, layer decay, its schedule, and mixup.

    python examples/timm_training.py --out runs/timm
    python examples/timm_training.py --defense privacy:epsilon=8,epochs=3,delta=0.001 --mixup 0

Four lines, marked below, are what a copy of timm's train.py needs. Mixup puts two records into one
example and is refused under differential privacy. The images are made here. The averaged weights
are then loaded by a model that knows nothing of vitguard.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg

CLASSES = 4


def photos(count: int) -> TensorDataset:
    """Return noise around one colour for each class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    colours = torch.randn(CLASSES, 3, 1, 1, generator=generator)
    noise = torch.randn(count, 3, 16, 16, generator=generator)
    return TensorDataset(colours[labels] + 0.5 * noise, labels)


def build() -> torch.nn.Module:
    """Return a small timm ViT."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2,
        num_classes=CLASSES,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and load the averaged weights into a plain model."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--defense", default="shuffle:ratio=0.5,dal=tokens")
    made.add_argument("--mixup", type=float, default=0.2)
    made.add_argument("--out", default="runs/timm")
    options = made.parse_args(arguments)

    model = build()
    guard = vg.protect(model, options.defense)  # 1. before .to(device), EMA and the optimizer
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75)
    loader = DataLoader(photos(256), 32, shuffle=True)
    optimizer, loader = guard.prepare(optimizer, loader)  # 2. after create_optimizer_v2
    schedule = CosineLRScheduler(optimizer, t_initial=3, warmup_t=1, warmup_lr_init=1e-3)
    average = ModelEmaV3(model, decay=0.9)
    mix = Mixup(mixup_alpha=options.mixup, num_classes=CLASSES) if options.mixup else None
    criterion = SoftTargetCrossEntropy() if mix else torch.nn.CrossEntropyLoss()
    for epoch in range(3):
        model.train()
        for images, labels in loader:
            if mix:
                images, labels = mix(images, labels)
            loss = criterion(model(images), labels) + guard.auxiliary_loss()  # 3. in the loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
        schedule.step(epoch + 1)

    Path(options.out).mkdir(parents=True, exist_ok=True)
    averaged = vg.Guard.of(average.module).export()  # 4. weights for a model without vitguard
    torch.save(averaged, Path(options.out) / "averaged.pt")
    plain = build()
    plain.load_state_dict(torch.load(Path(options.out) / "averaged.pt"), strict=True)
    images, labels = photos(256).tensors
    with torch.no_grad():
        right = plain.eval()(images).argmax(1) == labels
    print(f"a plain model gets {100 * float(right.float().mean()):.0f} % right")
    if "privacy" in options.defense:
        print(guard.privacy_spent())


if __name__ == "__main__":
    main()
