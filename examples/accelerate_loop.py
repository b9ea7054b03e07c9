"""Train a Vision Transformer in a loop with accelerate: shuffled patches, and DP to a target.

    python examples/accelerate_loop.py --out runs/accelerate

The images are made here, so nothing is downloaded. The weights are then loaded by a model that
knows nothing of vitguard.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from vitguard.integrations.accelerate import prepare

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
    """Train, save, and load the weights into a plain model."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument(
        "--defense",
        default="shuffle:ratio=0.5,dal=tokens+privacy:epsilon=8,epochs=3,delta=0.001",
    )
    made.add_argument("--out", default="runs/accelerate")
    options = made.parse_args(arguments)

    accelerator = Accelerator(cpu=True)
    model = build()
    guard = vg.protect(model, options.defense)
    model, optimizer, loader = prepare(
        accelerator,
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        DataLoader(photos(256), 32, shuffle=True),
    )
    for _ in range(3):
        model.train()
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels) + guard.auxiliary_loss()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(str(Path(options.out) / "state"))  # with the guard's state

    plain = build()
    plain.load_state_dict(guard.export(), strict=True)
    torch.save(plain.state_dict(), Path(options.out) / "plain.pt")
    images, labels = photos(256).tensors
    with torch.no_grad():
        right = plain.eval()(images).argmax(1) == labels
    print(f"a plain model gets {100 * float(right.float().mean()):.0f} % right")
    if "privacy" in options.defense:
        print(guard.privacy_spent())


if __name__ == "__main__":
    main()
