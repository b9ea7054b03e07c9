"""The model that server and clients build from its path and arguments; the start is public."""

from __future__ import annotations

import timm
import torch
from torch import nn


def tiny_vit(seed: int = 0) -> nn.Module:
    """Return a small Vision Transformer for 32 x 32 pixels and ten classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2,
            num_heads=3, num_classes=10,
        )  # fmt: skip
