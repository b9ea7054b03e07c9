"""Models by name: timm's, and the architecture that APRIL's closed form is proven for."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.core import Normalization
from vitguard.errors import InputError, expected
from vitguard.tensor_files import check_plain, read_checkpoint
from vitguard.vit import canonical_name

__all__ = [
    "AprilViT",
    "build_model",
    "check_finite",
    "find_device",
    "load_checkpoint",
    "normalization_of",
]


def build_model(spec: str, *, pretrained: bool = False, seed: int = 0) -> nn.Module:
    """Build a model from `NAME[:key=value,...]`, its random weights drawn from `seed`.

    Args:
        spec: A timm name or `april_vit`, with keyword arguments of its constructor.
        pretrained: Take timm's weights from the hub or its cache.

    Raises:
        InputError: An unknown name or keyword, or weights that cannot be had.
    """
    name, _, rest = spec.strip().partition(":")
    arguments = dict(_argument(item) for item in rest.split(",")) if rest else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "april_vit":
            return _construct(name, AprilViT, arguments)
        import timm

        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name[:12]}*")[:3])
            raise expected(
                "a timm model name or april_vit",
                repr(name),
                f"Close to it: {near}." if near else "",
            )
        return _construct(name, timm.create_model, {"model_name": name, **arguments}, pretrained)


def _argument(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key.isidentifier():
        raise expected("model arguments as key=value", repr(item))
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return key, words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return key, kind(text)
    return key, text


def _construct(
    name: str, build: Any, arguments: Mapping[str, Any], pretrained: bool = False
) -> nn.Module:
    extra = {"pretrained": True} if pretrained else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build(**arguments, **extra)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        given = ", ".join(f"{k}={v}" for k, v in arguments.items() if k != "model_name")
        what = f"weights for {name}" if pretrained else f"arguments that {name} takes"
        raise expected(what, f"{given or 'none'} ({first})") from error


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load weights strictly, from safetensors or a torch file without code (`weights_only`).

    Raises:
        InputError: A missing, foreign or compressed file, names or shapes that differ, tensors that
            are not dense or of another kind of number, values that are not finite; the model is
            then unchanged.
    """
    if not Path(path).is_file():
        raise expected("a checkpoint file", f"no file at {path}")
    state = _by_canonical_name(read_checkpoint(Path(path)), path)
    own = dict(model.state_dict())
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        words = [
            f"{len(n)} {w}, such as {n[0]}"
            for n, w in ((missing, "missing"), (unknown, "unknown"))
            if n
        ]
        raise expected("a checkpoint of this model", f"{path} ({'; '.join(words)})")
    wrong = next((k for k in own if state[k].shape != own[k].shape), None)
    if wrong:
        raise expected(
            f"{wrong} of shape {tuple(own[wrong].shape)}",
            f"{tuple(state[wrong].shape)} in {path}",
            "Give the model the arguments it was trained with.",
        )
    state = {k: _as_own(k, state[k], own[k], path) for k in own}
    model.load_state_dict(state, strict=True)


def _by_canonical_name(state: Mapping[Any, Any], path: object) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            name = canonical_name(str(key))
            if name in named:
                raise expected("each weight once", f"{name} under two names in {path}")
            named[name] = value
    return named


def _as_own(name: str, tensor: Tensor, own: Tensor, path: object) -> Tensor:
    """Return a file's tensor in the type of the model's own, once it is sound."""
    check_plain(name, tensor, path)
    if tensor.is_floating_point() != own.is_floating_point():
        raise expected(f"{name} of type {own.dtype}", f"{tensor.dtype} in {path}")
    converted = tensor.detach().to(own.dtype)
    if not bool(converted.isfinite().all()):
        raise expected("finite weights", f"NaN or infinity in {name} of {path}")
    return converted


def find_device(name: str) -> torch.device:
    """Return the device of that name, such as `cpu`, `cuda:1` or `mps`.

    Raises:
        InputError: There is no such device, or it cannot be used.
    """
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise expected("a device of this machine", f"{name!r} ({first})") from error


def check_finite(model: nn.Module) -> None:
    """Raise InputError if a weight of the model is NaN or infinite."""
    broken = next((k for k, v in model.named_parameters() if not bool(v.isfinite().all())), None)
    if broken:
        raise expected("finite weights", f"NaN or infinity in {broken}")


def normalization_of(model: nn.Module) -> Normalization:
    """Return the normalisation that a timm model states, mean and deviation 0.5 without one."""
    config = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, Mapping) else {}
    stated = Normalization()
    if "mean" in config and "std" in config:
        stated = Normalization(tuple(config["mean"]), tuple(config["std"]))
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    if channels == len(stated.mean):
        return stated
    # stated for colour, used with other channels: the means over the colours
    mean, std = (sum(v) / len(v) for v in (stated.mean, stated.std))
    return Normalization((mean,) * channels, (std,) * channels)


class AprilViT(nn.Module):
    """The Vision Transformer of APRIL's proof: attention first, no LayerNorm, no residual.

    Args:
        img_size, patch_size: Pixels, square.
        embed_dim, depth, num_heads, num_classes: As in timm.

    References:
        arXiv 2112.14087, theorem 1.
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 8,
        embed_dim: int = 192,
        depth: int = 2,
        num_heads: int = 4,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if img_size % patch_size or embed_dim % num_heads:
            raise InputError(
                f"Expected img_size divisible by patch_size and embed_dim by num_heads, got "
                f"{img_size} / {patch_size} and {embed_dim} / {num_heads}."
            )
        self.patch_embed = _PatchEmbedding(img_size, patch_size, embed_dim)
        patches = (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, patches, embed_dim))
        self.blocks = nn.Sequential(*(_AprilBlock(embed_dim, num_heads) for _ in range(depth)))
        self.head = nn.Linear(embed_dim, num_classes)
        self.global_pool = "avg"
        self.num_prefix_tokens = 0

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores, shape (batch, num_classes)."""
        tokens = self.patch_embed(images) + self.pos_embed
        return self.head(self.blocks(tokens).mean(dim=1))


class _PatchEmbedding(nn.Module):
    def __init__(self, img_size: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT


class _AprilAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(-2))


class _AprilBlock(nn.Module):
    residual = False

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = _AprilAttention(width, heads)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 2 * width))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(self.attn(tokens))
