"""Vision Transformers of transformers."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from vitguard.vit.anatomy import Anatomy, Block
from vitguard.vit.reading import classes_of, convolution_obstacles, has_norm, pair, present

__all__ = ["read"]


def read(model: nn.Module) -> Anatomy | None:
    """Return the anatomy of a Vision Transformer of transformers, None for any other model."""
    base = next(
        (
            n
            for n, m in model.named_children()
            if hasattr(getattr(m, "embeddings", None), "patch_embeddings")
        ),
        None,
    )
    if base is None:
        return None
    inner: Any = getattr(model, base)
    embeddings = inner.embeddings
    convolution = getattr(embeddings.patch_embeddings, "projection", None)
    if not isinstance(convolution, nn.Conv2d):
        return None
    config: Any = getattr(model, "config", None)
    stem = f"{base}.embeddings"
    image_size, patch_size = pair(config.image_size), pair(convolution.kernel_size)
    patches = (image_size[0] // patch_size[0]) * (image_size[1] // patch_size[1])
    prefix = present(
        model, f"{stem}.cls_token", f"{stem}.distillation_token", f"{stem}.register_tokens"
    )
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    positions = present(model, f"{stem}.position_embeddings")
    rows = parameters[positions[0]].shape[1] if positions else patches
    prefix_tokens = sum(parameters[p].shape[1] for p in prefix)
    found = sorted(
        (n for n, m in model.named_modules() if re.fullmatch(rf"{base}\.(\w+\.)?layers?\.\d+", n)),
        key=lambda n: int(n.rsplit(".", 1)[1]),
    )
    if not all(hasattr(model.get_submodule(n), "attention") for n in found):
        found = []  # stages of blocks (Swin), whose tokens are merged on the way
    heads = [n for n, m in model.named_children() if n.endswith("classifier")]
    obstacles = convolution_obstacles(convolution)
    if has_norm(getattr(embeddings, "norm", None)):
        obstacles.append("a norm inside the patch embedding")
    return Anatomy(
        family="transformers",
        patch=f"{stem}.patch_embeddings.projection",
        patch_stage=f"{stem}.patch_embeddings",
        positions=positions[0] if positions else None,
        position_prefix=rows - patches if rows > patches else 0,
        prefix=prefix,
        embedded=f"{stem}.dropout" if hasattr(embeddings, "dropout") else None,
        blocks=tuple(_block(n, model.get_submodule(n)) for n in found),
        head=tuple(heads),
        image_size=image_size,
        patch_size=patch_size,
        channels=convolution.in_channels,
        width=convolution.out_channels,
        classes=classes_of(*(getattr(model, n) for n in heads)),
        pooling="avg" if _averages(inner, prefix) else "token",
        prefix_tokens=prefix_tokens,
        obstacles=tuple(obstacles),
    )


def _averages(inner: Any, prefix: tuple[str, ...]) -> bool:
    """Whether the head reads the mean of the tokens: BEiT's pooler, or no class token (I-JEPA)."""
    pooler = getattr(inner, "pooler", None)
    return not prefix or has_norm(getattr(pooler, "layernorm", None))


def _block(name: str, block: nn.Module) -> Block:
    modules = dict(block.named_modules())

    def first(*candidates: str) -> str:
        return next((c for c in candidates if c in modules), candidates[0])

    inner = "attention.attention" if "attention.attention" in modules else "attention"
    q = first(f"{inner}.q_proj", f"{inner}.query")
    k = first(f"{inner}.k_proj", f"{inner}.key")
    v = first(f"{inner}.v_proj", f"{inner}.value")
    weights = [f"{m}.weight" for m in (q, k, v)]
    biases = present(block, *(f"{m}.bias" for m in (q, k, v)))
    norm1 = first("layernorm_before", "norm1", "layer_norm1")
    norm2 = first("layernorm_after", "norm2", "layer_norm2")
    fc1 = first("mlp.fc1", "intermediate.dense", "mlp.weights_in")
    fc2 = first("mlp.fc2", "output.dense", "mlp.weights_out")
    scale1 = present(block, "layer_scale1.lambda1", "lambda_1")
    scale2 = present(block, "layer_scale2.lambda1", "lambda_2")
    return Block(
        name=name,
        attention=f"{name}.attention",
        mlp=f"{name}.mlp",
        norm1=f"{name}.{norm1}",
        norm2=f"{name}.{norm2}",
        qkv=tuple(f"{name}.{w}" for w in weights),
        qkv_bias=tuple(f"{name}.{b}" for b in biases),
        proj=f"{name}.{first('attention.o_proj', 'attention.output.dense')}",
        fc1=f"{name}.{fc1}",
        fc2=f"{name}.{fc2}",
        scale1=f"{name}.{scale1[0]}" if scale1 else None,
        scale2=f"{name}.{scale2[0]}" if scale2 else None,
        pre_norm=norm1 in modules,
        gated=fc1.endswith("weights_in"),
        heads=int(getattr(modules.get(inner), "num_attention_heads", 0)),
    )
