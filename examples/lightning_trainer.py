"""Train a Vision Transformer with Lightning: shuffled patches, and DP to a target.

    python examples/lightning_trainer.py --out runs/lightning

The images are made here, so nothing is downloaded. The checkpoint is then loaded by a model that
knows nothing of vitguard.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from vitguard.integrations.lightning import GuardMixin

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


class Lit(L.LightningModule):
    """A module as people write it, with one line that protects."""

    def __init__(self, defense: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = build()
        vg.protect(self.net, defense)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(photos(256), 32, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class GuardedLit(GuardMixin, Lit):
    """The same module with loader, optimizer, loss and checkpoint of a protected model."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, and load the checkpoint into a plain model."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument(
        "--defense",
        default="shuffle:ratio=0.5,dal=tokens+privacy:epsilon=8,epochs=3,delta=0.001",
    )
    made.add_argument("--out", default="runs/lightning")
    options = made.parse_args(arguments)

    module = GuardedLit(options.defense)
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=options.out,
    )  # fmt: skip
    trainer.fit(module)
    path = Path(options.out) / "last.ckpt"
    trainer.save_checkpoint(path)

    loaded = GuardedLit.load_from_checkpoint(path)
    plain = build()
    plain.load_state_dict(loaded.guard.export(), strict=True)
    images, labels = photos(256).tensors
    with torch.no_grad():
        right = plain.eval()(images).argmax(1) == labels
    print(f"a plain model gets {100 * float(right.float().mean()):.0f} % right; {path}")
    if "privacy" in options.defense:
        print(module.guard.privacy_spent())


if __name__ == "__main__":
    main()
