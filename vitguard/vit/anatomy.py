"""Where a Vision Transformer keeps its patches, positions, tokens and blocks, by role."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.errors import NotApplicable, UnsupportedModel, expected
from vitguard.selectors import select_names
from vitguard.vit.reading import classes_of

__all__ = ["READERS", "Anatomy", "Block"]


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
        readers: What lies between the last block and the head and has an attention of its own, in
            which a token of its own reads all others: class attention (CaiT), attention pooling.
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
    readers: tuple[Block, ...] = ()

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
        classes = classes_of(*heads)
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
        if name == self.positions or name.rpartition(".")[2] == "pos_embed":
            return "position"  # of a shape that nothing here reads, too
        if name in self.prefix:
            return "token"
        if name.startswith((f"{self.patch_stage}.", f"{self.patch}.")):
            return "patch"
        for block in self.blocks:
            if name.startswith(f"{block.attention}."):
                return "attention"
            if name.startswith((f"{block.mlp}.", f"{block.fc1}.", f"{block.fc2}.")):
                return "mlp"
        for reader in self.readers:  # attention pooling has its norm and its MLP inside
            if name.startswith((f"{reader.mlp}.", f"{reader.fc1}.", f"{reader.fc2}.")):
                return "mlp"
            if name.startswith(f"{reader.norm2}."):
                return "norm"
            if name.startswith(f"{reader.attention}."):
                return "attention"
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
        for recognise in READERS:
            anatomy = recognise(model)
            if anatomy is not None:
                return anatomy
        raise UnsupportedModel(
            "Expected a Vision Transformer with a patch convolution (timm `patch_embed.proj`, "
            "transformers `*.embeddings.patch_embeddings.projection`, torchvision `conv_proj`), "
            f"got {type(model).__name__} with {', '.join(n for n, _ in model.named_children())}. "
            "Give an Anatomy by hand: protect(model, ..., anatomy=Anatomy(...))."
        )


READERS: list[Callable[[nn.Module], Anatomy | None]] = []
"""What recognises a model, one for each library; `vitguard.vit` fills it."""


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
