"""Train a Vision Transformer with Hugging Face's Trainer: shuffled patches, and DP to a target.

    python examples/huggingface_trainer.py --out runs/huggingface

The images are made here, so nothing is downloaded. The checkpoint is then loaded by a model that
knows nothing of vitguard.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import vitguard as vg
from vitguard.integrations.transformers import GuardedTrainer

CLASSES = 4


class Photos(torch.utils.data.Dataset):
    """Noise around one colour for each class."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(count) % CLASSES
        colours = torch.randn(CLASSES, 3, 1, 1, generator=generator)
        noise = torch.randn(count, 3, 16, 16, generator=generator)
        self.images = colours[self.labels] + 0.5 * noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.images[i], "labels": int(self.labels[i])}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, and load the checkpoint into a plain model."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument(
        "--defense",
        default="shuffle:ratio=0.5,dal=tokens+privacy:epsilon=8,epochs=3,delta=0.001",
    )
    made.add_argument("--out", default="runs/huggingface")
    options = made.parse_args(arguments)

    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, num_labels=CLASSES,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    guard = vg.protect(model, options.defense)
    photos = Photos(256)
    trainer = GuardedTrainer(
        model=model,
        args=TrainingArguments(
            options.out, num_train_epochs=3, per_device_train_batch_size=16,
            gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=8, report_to=[],
            save_strategy="epoch", save_total_limit=1, use_cpu=True,
        ),
        train_dataset=photos,
    )  # fmt: skip
    trainer.train()

    newest = max(Path(options.out).glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
    plain = ViTForImageClassification.from_pretrained(newest).eval()
    with torch.no_grad():
        right = plain(photos.images).logits.argmax(1) == photos.labels
    print(f"a plain model gets {100 * float(right.float().mean()):.0f} % right; {newest}")
    if "privacy" in options.defense:
        print(guard.privacy_spent())


if __name__ == "__main__":
    main()
