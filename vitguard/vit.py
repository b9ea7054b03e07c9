"""Anatomy: where a Vision Transformer keeps its patches, positions, tokens and blocks.

The only file that knows the attribute names of timm, transformers and torchvision. Everything else
asks an `Anatomy`, which names parameters and modules by role.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import cuda as backends

from vitguard.errors import NotApplicable, UnsupportedModel, expected
from vitguard.selectors import select_names

__all__ = [
    "Anatomy",
    "Block",
    "canonical_name",
    "canonical_parameters",
    "logits_of",
    "math_attention",
]

_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "_module.")


def canonical_name(name: str) -> str:
    """Return the base model's name of a parameter seen through DDP, compile, PEFT or Opacus."""
    while True:
        wrapper = next((w for w in _WRAPPERS if name.startswith(w)), None)
        if wrapper is None:
            return name.replace(".base_layer.", ".").replace("._orig_mod.", ".")
        name = name[len(wrapper) :]


def canonical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of a model, wrapped or not, by canonical name."""
    return {canonical_name(k): p for k, p in model.named_parameters() if p.requires_grad}


def logits_of(output: Any) -> Tensor:
    """Return the class scores of a model's output: a tensor, or an object with `.logits`."""
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise expected("a model that returns class scores", type(output).__name__)


_MATH_LOCK = threading.Lock()
_math_users = 0
_kernels: dict[Callable[[bool], None], bool] = {}


@contextmanager
def math_attention() -> Iterator[None]:
    """Use the attention kernel that has a second derivative, inside the block only.

    The switch is one for the whole process, so threads share it: the first to enter turns it, the
    last to leave puts it back.
    """
    global _math_users, _kernels
    with _MATH_LOCK:
        if _math_users == 0:
            _kernels = {
                backends.enable_flash_sdp: backends.flash_sdp_enabled(),
                backends.enable_mem_efficient_sdp: backends.mem_efficient_sdp_enabled(),
                backends.enable_cudnn_sdp: backends.cudnn_sdp_enabled(),
                backends.enable_math_sdp: backends.math_sdp_enabled(),
            }
            for enable in _kernels:
                enable(enable is backends.enable_math_sdp)
        _math_users += 1
    try:
        yield
    finally:
        with _MATH_LOCK:
            _math_users -= 1
            if _math_users == 0:
                for enable, before in _kernels.items():
                    enable(before)


@dataclass(frozen=True)
class Block:
    """One transformer block, by name: modules end without, parameters with their last part.

    `scale1` and `scale2` are LayerScale parameters, `gated` says that the MLP multiplies two
    branches (SwiGLU), `pre_norm` that attention reads `norm1(x)`, `residual` that x is added to it,
    `centred` that the norms subtract the mean (LayerNorm) and do not only divide (RMSNorm). `heads`
    is the number of attention heads, 0 where it is not known.
    """

    name: str
    attention: str
    mlp: str
    norm1: str
    norm2: str
    qkv: tuple[str, ...]
    qkv_bias: tuple[str, ...]
    proj: str
    fc1: str
    fc2: str
    scale1: str | None = None
    scale2: str | None = None
    pre_norm: bool = True
    residual: bool = True
    gated: bool = False
    centred: bool = True
    heads: int = 0


@dataclass(frozen=True)
class Anatomy:
    """Names and sizes of a Vision Transformer by role; can be given by hand.

    Args:
        family: `"timm"`, `"transformers"`, `"torchvision"` or any name of one's own.
        patch: Module name of the convolution that embeds patches.
        patch_stage: Module name of the whole patch embedding (its output is what positions join).
        positions: Parameter (or buffer) name of the absolute position embedding, None without one.
        position_prefix: Leading rows of the position embedding that belong to prefix tokens.
        prefix: Parameter names of the prefix tokens (class, distillation, register), in order.
        embedded: Module name whose input is the embedded sequence, positions included.
        blocks: The blocks in order.
        head: Module names of the classification heads.
        image_size, patch_size: (height, width) in pixels.
        channels, width, classes: Input channels, token width D, classes of the head.
        pooling: `"token"` (class token), `"avg"` (mean of tokens) or the library's own word.
        obstacles: Why equations about the embedding would not hold (a norm inside it, say).
    """

    family: str
    patch: str
    patch_stage: str
    positions: str | None
    position_prefix: int
    prefix: tuple[str, ...]
    embedded: str | None
    blocks: tuple[Block, ...]
    head: tuple[str, ...]
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    width: int
    classes: int
    pooling: str = "token"
    prefix_tokens: int = 1
    obstacles: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patches(self) -> int:
        """Patches per image, N."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens per image, T = N + prefix tokens."""
        return self.patches + self.prefix_tokens

    @property
    def patch_pixels(self) -> int:
        """Values in one patch, P = channels * height * width."""
        return self.channels * self.patch_size[0] * self.patch_size[1]

    @property
    def patch_weight(self) -> str:
        """Parameter name of the patch weight, shape (width, channels, height, width)."""
        return f"{self.patch}.weight"

    @property
    def patch_bias(self) -> str:
        """Parameter name of the patch embedding's bias, shape (width,); it may not exist."""
        return f"{self.patch}.bias"

    def patchify(self, images: Tensor) -> Tensor:
        """Cut (..., channels, height, width) into (..., patches, pixels per patch), row by row."""
        return _patchify(images, self.grid, self.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Invert `patchify`; a border that no patch covers is zero."""
        images = _unpatchify(patches, self.grid, self.patch_size, self.channels)
        down, across = (
            whole - covered
            for whole, covered in zip(self.image_size, images.shape[-2:], strict=True)
        )
        return F.pad(images, (0, across, 0, down)) if down or across else images

    def with_head_of(self, model: nn.Module) -> Anatomy:
        """Return the anatomy with as many classes as the head has that the model holds now."""
        modules = dict(model.named_modules())
        if not any(name in modules for name in self.head):
            return self  # one given by hand, or a head that was taken out
        heads = [modules[name] for name in self.head if name in modules]
        classes = _classes(*heads)
        if not classes and not all(isinstance(h, nn.Identity) for h in heads):
            return self  # a head of another kind: as it was read, or said by hand
        return self if classes == self.classes else replace(self, classes=classes)

    def covered(self, images: Tensor) -> Tensor:
        """Cut (..., height, width) to what the patches cover; they need not divide the image."""
        (rows, columns), (high, wide) = self.grid, self.patch_size
        return images[..., : rows * high, : columns * wide]

    def require_plain_embedding(self) -> None:
        """Raise NotApplicable unless z_i = W x_i + b + e_i enters the first block unchanged."""
        if self.obstacles:
            raise NotApplicable("; ".join(self.obstacles))

    def role(self, name: str) -> str:
        """Return the role of a parameter: one of `SELECTORS` but embedding and all, or `other`."""
        if name == self.positions:
            return "position"
        if name in self.prefix:
            return "token"
        if name.startswith((f"{self.patch_stage}.", f"{self.patch}.")):
            return "patch"
        for block in self.blocks:
            if name.startswith(f"{block.attention}."):
                return "attention"
            if name.startswith((f"{block.mlp}.", f"{block.fc1}.", f"{block.fc2}.")):
                return "mlp"
        if any(name.startswith(f"{head}.") for head in self.head):
            return "head"
        return "norm" if "norm" in name or ".ln" in name else "other"

    def select(self, selector: str, names: Iterable[str]) -> list[str]:
        """Return those of `names` that a selection means (`vitguard.selectors.select_names`).

        Raises:
            InputError: A part is no role, and as a regular expression matches no name or has a role
                among its alternatives.
        """
        return select_names(self, selector, names)

    @staticmethod
    def of(model: nn.Module) -> Anatomy:
        """Recognise a timm, transformers or torchvision Vision Transformer.

        Raises:
            UnsupportedModel: None was recognised; the message says what was looked for.
            InputError: Something else than a model.
        """
        if not isinstance(model, nn.Module):
            raise expected("an nn.Module", repr(model), "vitguard.models.build_model builds one.")
        for recognise in _FAMILIES:
            anatomy = recognise(model)
            if anatomy is not None:
                return anatomy
        raise UnsupportedModel(
            "Expected a Vision Transformer with a patch convolution (timm `patch_embed.proj`, "
            "transformers `*.embeddings.patch_embeddings.projection`, torchvision `conv_proj`), "
            f"got {type(model).__name__} with {', '.join(n for n, _ in model.named_children())}. "
            "Give an Anatomy by hand: protect(model, ..., anatomy=Anatomy(...))."
        )


def _patchify(images: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    (rows, columns), (high, wide) = grid, patch
    # a border that no patch covers is never seen by the model
    border = images.shape[-2] - rows * high, images.shape[-1] - columns * wide
    if 0 <= border[0] < high and 0 <= border[1] < wide:
        images = images[..., : rows * high, : columns * wide]
    *lead, channels, _, _ = images.shape
    cut = images.reshape(*lead, channels, rows, high, columns, wide)
    n = len(lead)
    order = [*range(n), n + 1, n + 3, n, n + 2, n + 4]
    return cut.permute(order).reshape(*lead, rows * columns, channels * high * wide)


def _unpatchify(
    patches: Tensor, grid: tuple[int, int], patch: tuple[int, int], channels: int
) -> Tensor:
    *lead, _, _ = patches.shape
    rows, columns = grid
    high, wide = patch
    cut = patches.reshape(*lead, rows, columns, channels, high, wide)
    n = len(lead)
    order = [*range(n), n + 2, n, n + 3, n + 1, n + 4]
    return cut.permute(order).reshape(*lead, channels, rows * high, columns * wide)


def _classes(*heads: nn.Module | None) -> int:
    """Return the outputs of the last linear layer of the first head that has one, 0 without."""
    for head in heads:
        layers = [m for m in head.modules() if isinstance(m, nn.Linear)] if head else []
        outputs = int(getattr(head, "out_features", 0) or 0)
        if layers or outputs:
            return outputs or int(layers[-1].out_features)
    return 0


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _has_norm(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _centres(norm: nn.Module | None) -> bool:
    return "rms" not in type(norm).__name__.lower()


def _convolution_obstacles(convolution: nn.Conv2d) -> list[str]:
    if tuple(convolution.kernel_size) != tuple(convolution.stride):
        return ["patches overlap: the patch convolution's stride is not its kernel size"]
    return []


def _present(model: nn.Module, *names: str) -> tuple[str, ...]:
    known = {n for n, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    return tuple(n for n in names if n in known)


def _timm(model: nn.Module) -> Anatomy | None:
    stage: Any = getattr(model, "patch_embed", None)
    convolution = getattr(stage, "proj", None)
    if not isinstance(convolution, nn.Conv2d) or not hasattr(stage, "img_size"):
        return None
    obstacles = _convolution_obstacles(convolution)
    if _has_norm(getattr(stage, "norm", None)):
        obstacles.append("a norm inside the patch embedding")
    if _has_norm(getattr(model, "norm_pre", None)):
        obstacles.append("a norm between the embedding and the first block")
    if _has_norm(getattr(model, "patch_drop", None)):
        obstacles.append("patch dropout")
    image_size, patch_size = _pair(stage.img_size or 224), _pair(convolution.kernel_size)
    channels = convolution.in_channels
    if isinstance(getattr(stage, "backbone", None), nn.Module):
        obstacles.append("a convolutional network before the patch embedding")
        grid = _pair(stage.grid_size)
        patch_size = (image_size[0] // grid[0], image_size[1] // grid[1])
        channels = next(m.in_channels for m in stage.backbone.modules() if isinstance(m, nn.Conv2d))
    patches = (image_size[0] // patch_size[0]) * (image_size[1] // patch_size[1])
    position = getattr(model, "pos_embed", None)
    if isinstance(position, Tensor) and position.dim() != 3:
        obstacles.append(f"a position embedding with {position.dim()} dimensions instead of 3")
    prefix = _present(model, "cls_token", "dist_token", "reg_token")
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
        blocks=tuple(_timm_block(n, b) for n, b in blocks) if _sequential(blocks) else (),
        head=tuple(heads),
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        width=convolution.out_channels,
        classes=_classes(getattr(head, "fc", None), head),
        pooling=str(getattr(model, "global_pool", "token")),
        prefix_tokens=prefix_tokens,
        obstacles=tuple(obstacles),
    )


def _sequential(blocks: list[tuple[str, Any]]) -> bool:
    """Whether each block has one attention and one MLP; parallel ones have several or none."""
    return all(hasattr(b, "attn") and hasattr(b, "mlp") for _, b in blocks)


def _timm_block(name: str, block: Any) -> Block:
    attention, mlp = f"{name}.attn", f"{name}.mlp"
    biases = _present(block, "attn.qkv.bias", "attn.q_bias", "attn.v_bias")
    if hasattr(block.attn, "q_proj") and block.attn.q_proj is not None:
        weights: tuple[str, ...] = (
            "attn.q_proj.weight",
            "attn.k_proj.weight",
            "attn.v_proj.weight",
        )
        biases = _present(block, "attn.q_proj.bias", "attn.k_proj.bias", "attn.v_proj.bias")
    else:
        weights = _present(block, "attn.qkv.weight")
    scale1 = _present(block, "ls1.gamma", "gamma_1")
    scale2 = _present(block, "ls2.gamma", "gamma_2")
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
        centred=_centres(getattr(block, "norm1", None)),
        heads=int(getattr(block.attn, "num_heads", 0)),
    )


def _transformers(model: nn.Module) -> Anatomy | None:
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
    image_size, patch_size = _pair(config.image_size), _pair(convolution.kernel_size)
    patches = (image_size[0] // patch_size[0]) * (image_size[1] // patch_size[1])
    prefix = _present(
        model, f"{stem}.cls_token", f"{stem}.distillation_token", f"{stem}.register_tokens"
    )
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    positions = _present(model, f"{stem}.position_embeddings")
    rows = parameters[positions[0]].shape[1] if positions else patches
    prefix_tokens = sum(parameters[p].shape[1] for p in prefix)
    found = sorted(
        (n for n, m in model.named_modules() if re.fullmatch(rf"{base}\.(\w+\.)?layers?\.\d+", n)),
        key=lambda n: int(n.rsplit(".", 1)[1]),
    )
    if not all(hasattr(model.get_submodule(n), "attention") for n in found):
        found = []  # stages of blocks (Swin), whose tokens are merged on the way
    heads = [n for n, m in model.named_children() if n.endswith("classifier")]
    obstacles = _convolution_obstacles(convolution)
    if _has_norm(getattr(embeddings, "norm", None)):
        obstacles.append("a norm inside the patch embedding")
    return Anatomy(
        family="transformers",
        patch=f"{stem}.patch_embeddings.projection",
        patch_stage=f"{stem}.patch_embeddings",
        positions=positions[0] if positions else None,
        position_prefix=rows - patches if rows > patches else 0,
        prefix=prefix,
        embedded=f"{stem}.dropout" if hasattr(embeddings, "dropout") else None,
        blocks=tuple(_transformers_block(n, model.get_submodule(n)) for n in found),
        head=tuple(heads),
        image_size=image_size,
        patch_size=patch_size,
        channels=convolution.in_channels,
        width=convolution.out_channels,
        classes=_classes(*(getattr(model, n) for n in heads)),
        pooling="token",
        prefix_tokens=prefix_tokens,
        obstacles=tuple(obstacles),
    )


def _transformers_block(name: str, block: nn.Module) -> Block:
    modules = dict(block.named_modules())

    def first(*candidates: str) -> str:
        return next((c for c in candidates if c in modules), candidates[0])

    inner = "attention.attention" if "attention.attention" in modules else "attention"
    q = first(f"{inner}.q_proj", f"{inner}.query")
    k = first(f"{inner}.k_proj", f"{inner}.key")
    v = first(f"{inner}.v_proj", f"{inner}.value")
    weights = [f"{m}.weight" for m in (q, k, v)]
    biases = _present(block, *(f"{m}.bias" for m in (q, k, v)))
    norm1 = first("layernorm_before", "norm1", "layer_norm1")
    norm2 = first("layernorm_after", "norm2", "layer_norm2")
    fc1 = first("mlp.fc1", "intermediate.dense", "mlp.weights_in")
    fc2 = first("mlp.fc2", "output.dense", "mlp.weights_out")
    scale1 = _present(block, "layer_scale1.lambda1")
    scale2 = _present(block, "layer_scale2.lambda1")
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


def _torchvision(model: nn.Module) -> Anatomy | None:
    convolution = getattr(model, "conv_proj", None)
    encoder: Any = getattr(model, "encoder", None)
    if not isinstance(convolution, nn.Conv2d) or not hasattr(encoder, "pos_embedding"):
        return None
    image_size, patch_size = (
        _pair(getattr(model, "image_size", 224)),
        _pair(convolution.kernel_size),
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
        classes=_classes(getattr(model, "heads", None)),
        obstacles=tuple(_convolution_obstacles(convolution)),
    )


_FAMILIES: tuple[Callable[[nn.Module], Anatomy | None], ...] = (_timm, _transformers, _torchvision)
