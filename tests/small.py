"""The small model that tests build where they need one of their own."""

from __future__ import annotations

from typing import Any

import timm


def vit(**change: Any) -> Any:
    """A ViT of one block and 16 patches of 8 x 8 pixels, ten classes; `change` names others."""
    size = {"img_size": 32, "patch_size": 8, "depth": 1, "num_classes": 10, "embed_dim": 64}
    return timm.create_model("vit_tiny_patch16_224", num_heads=2, **{**size, **change})
