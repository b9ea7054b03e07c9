"""Vision Transformers of torchvision."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitguard.vit.anatomy import Anatomy, Block
from vitguard.vit.reading import classes_of, convolution_obstacles, pair

__all__ = ["read"]


def read(model: nn.Module) -> Anatomy | None:
    """Return the anatomy of a Vision Transformer of torchvision, None for any other model."""
    convolution = getattr(model, "conv_proj", None)
    encoder: Any = getattr(model, "encoder", None)
    if not isinstance(convolution, nn.Conv2d) or not hasattr(encoder, "pos_embedding"):
        return None
    image_size, patch_size = (
        pair(getattr(model, "image_size", 224)),
        pair(convolution.kernel_size),
    )
    patches = (image_size[0] // patch_size[0]) * (image_size[1] // patch_size[1])
    names = [f"encoder.layers.{n}" for n, _ in encoder.layers.named_children()]
    return Anatomy(
        family="torchvision",
        patch="conv_proj",
        patch_stage="conv_proj",
        positions="encoder.pos_embedding",
        position_prefix=encoder.pos_embedding.shape[1] - patches,
        prefix=("class_token",),
        embedded="encoder.dropout",
        blocks=tuple(
            Block(
                name=n,
                attention=f"{n}.self_attention",
                mlp=f"{n}.mlp",
                norm1=f"{n}.ln_1",
                norm2=f"{n}.ln_2",
                qkv=(f"{n}.self_attention.in_proj_weight",),
                qkv_bias=(f"{n}.self_attention.in_proj_bias",),
                proj=f"{n}.self_attention.out_proj",
                fc1=f"{n}.mlp.0",
                fc2=f"{n}.mlp.3",
                heads=int(getattr(model.get_submodule(f"{n}.self_attention"), "num_heads", 0)),
            )
            for n in names
        ),
        head=("heads",),
        image_size=image_size,
        patch_size=patch_size,
        channels=convolution.in_channels,
        width=convolution.out_channels,
        classes=classes_of(getattr(model, "heads", None)),
        obstacles=tuple(convolution_obstacles(convolution)),
    )
