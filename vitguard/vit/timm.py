"""Vision Transformers of timm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitguard.vit.anatomy import Anatomy, Block
from vitguard.vit.reading import centres, classes_of, convolution_obstacles, has_norm, pair, present

__all__ = ["read"]


def read(model: nn.Module) -> Anatomy | None:
    """Return the anatomy of a Vision Transformer of timm, None for any other model."""
    stage: Any = getattr(model, "patch_embed", None)
    convolution = getattr(stage, "proj", None)
    if not isinstance(convolution, nn.Conv2d) or not hasattr(stage, "img_size"):
        return None
    obstacles = convolution_obstacles(convolution)
    if has_norm(getattr(stage, "norm", None)):
        obstacles.append("a norm inside the patch embedding")
    if has_norm(getattr(model, "norm_pre", None)):
        obstacles.append("a norm between the embedding and the first block")
    if has_norm(getattr(model, "patch_drop", None)):
        obstacles.append("patch dropout")
    image_size, patch_size = pair(stage.img_size or 224), pair(convolution.kernel_size)
    channels = convolution.in_channels
    if isinstance(getattr(stage, "backbone", None), nn.Module):
        obstacles.append("a convolutional network before the patch embedding")
        grid = pair(stage.grid_size)
        patch_size = (image_size[0] // grid[0], image_size[1] // grid[1])
        channels = next(m.in_channels for m in stage.backbone.modules() if isinstance(m, nn.Conv2d))
    patches = (image_size[0] // patch_size[0]) * (image_size[1] // patch_size[1])
    position = getattr(model, "pos_embed", None)
    if isinstance(position, Tensor) and position.dim() != 3:
        obstacles.append(f"a position embedding with {position.dim()} dimensions instead of 3")
    prefix = present(model, "cls_token", "dist_token", "reg_token")
    if not hasattr(model, "blocks_token_only"):
        prefix_tokens = int(getattr(model, "num_prefix_tokens", len(prefix)) or 0)
    else:
        prefix_tokens = 0  # CaiT: the class token joins after the patch blocks
    rows = position.shape[1] if isinstance(position, Tensor) and position.dim() == 3 else patches
    blocks = [(f"blocks.{i}", b) for i, b in enumerate(getattr(model, "blocks", []))]
    for i, layer in enumerate(getattr(model, "layers", [])):
        blocks += [
            (f"layers.{i}.blocks.{j}", b) for j, b in enumerate(getattr(layer, "blocks", []))
        ]
    heads = [n for n in ("head", "head_dist") if isinstance(getattr(model, n, None), nn.Module)]
    head = getattr(model, "head", None)
    return Anatomy(
        family="timm",
        patch="patch_embed.proj",
        patch_stage="patch_embed",
        positions="pos_embed" if isinstance(position, Tensor) and position.dim() == 3 else None,
        position_prefix=rows - patches if rows > patches else 0,
        prefix=prefix,
        embedded="pos_drop" if hasattr(model, "pos_drop") else None,
        blocks=tuple(_block(n, b) for n, b in blocks) if _sequential(blocks) else (),
        head=tuple(heads),
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        width=convolution.out_channels,
        classes=classes_of(getattr(head, "fc", None), head),
        pooling=str(getattr(model, "global_pool", "token")),
        prefix_tokens=prefix_tokens,
        obstacles=tuple(obstacles),
        readers=_readers(model),
    )


def _sequential(blocks: list[tuple[str, Any]]) -> bool:
    """Whether each block has one attention and one MLP; parallel ones have several or none."""
    return all(hasattr(b, "attn") and hasattr(b, "mlp") for _, b in blocks)


def _readers(model: nn.Module) -> tuple[Block, ...]:
    """Return class attention (CaiT) and attention pooling, which read the tokens of all blocks."""
    late = enumerate(getattr(model, "blocks_token_only", None) or ())
    found = [_reader(f"blocks_token_only.{i}", "attn.", b) for i, b in late if hasattr(b, "attn")]
    if (pool := getattr(model, "attn_pool", None)) is not None:
        found.append(_reader("attn_pool", "", pool))
    return tuple(found)


def _reader(name: str, inside: str, reader: Any) -> Block:
    attention = getattr(reader, "attn", reader)
    layers = [f"{inside}{layer}" for layer in ("q", "k", "v", "kv")]
    return Block(
        name=name,
        attention=f"{name}.{inside}".rstrip("."),
        mlp=f"{name}.mlp",
        norm1=f"{name}.norm1",
        norm2=f"{name}.norm2" if inside else f"{name}.norm",
        qkv=tuple(f"{name}.{n}" for n in present(reader, *(f"{one}.weight" for one in layers))),
        qkv_bias=tuple(f"{name}.{n}" for n in present(reader, *(f"{one}.bias" for one in layers))),
        proj=f"{name}.{inside}proj",
        fc1=f"{name}.mlp.fc1",
        fc2=f"{name}.mlp.fc2",
        heads=int(getattr(attention, "num_heads", 0)),
    )


def _block(name: str, block: Any) -> Block:
    attention, mlp = f"{name}.attn", f"{name}.mlp"
    biases = present(block, "attn.qkv.bias", "attn.q_bias", "attn.v_bias")
    if hasattr(block.attn, "q_proj") and block.attn.q_proj is not None:
        weights: tuple[str, ...] = (
            "attn.q_proj.weight",
            "attn.k_proj.weight",
            "attn.v_proj.weight",
        )
        biases = present(block, "attn.q_proj.bias", "attn.k_proj.bias", "attn.v_proj.bias")
    elif not (weights := present(block, "attn.qkv.weight")):  # ConViT
        weights = present(block, "attn.qk.weight", "attn.v.weight")
        biases = present(block, "attn.qk.bias", "attn.v.bias")
    scale1 = present(block, "ls1.gamma", "gamma_1")
    scale2 = present(block, "ls2.gamma", "gamma_2")
    fc1 = "mlp.fc1" if hasattr(block.mlp, "fc1") else "mlp.fc1_g"
    width = getattr(getattr(block.mlp, "fc1", None), "out_features", 0)
    inner = getattr(getattr(block.mlp, "fc2", None), "in_features", width)
    return Block(
        name=name,
        attention=attention,
        mlp=mlp,
        norm1=f"{name}.norm1",
        norm2=f"{name}.norm2",
        qkv=tuple(f"{name}.{w}" for w in weights),
        qkv_bias=tuple(f"{name}.{b}" for b in biases),
        proj=f"{attention}.proj",
        fc1=f"{name}.{fc1}",
        fc2=f"{mlp}.fc2",
        scale1=f"{name}.{scale1[0]}" if scale1 else None,
        scale2=f"{name}.{scale2[0]}" if scale2 else None,
        pre_norm=hasattr(block, "norm1")
        and not any(kind in type(block).__name__ for kind in ("Post", "Parallel")),
        residual=getattr(block, "residual", True),
        gated=width != inner or hasattr(block.mlp, "fc1_g"),
        centred=centres(getattr(block, "norm1", None)),
        heads=int(getattr(block.attn, "num_heads", 0)),
    )
