"""Models by name: timm's, and the architecture that APRIL's closed form is proven for."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.core import Normalization
from vitguard.errors import InputError, UnsupportedModel, expected
from vitguard.tensor_files import UNNAMED, check_plain, read_checkpoint
from vitguard.vit import Anatomy, canonical_name

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

    A size of height and width is written `img_size=32x64`.

    Args:
        spec: A timm name or `april_vit`, with keyword arguments of its constructor.
        pretrained: Take timm's weights from the hub or its cache.

    Raises:
        InputError: An unknown name or keyword, one that loads weights, or weights that cannot be
            had.
    """
    name, _, rest = spec.strip().partition(":")
    given = [_argument(item) for item in rest.split(",")] if rest else []
    arguments = dict(given)
    if twice := [key for key, count in Counter(key for key, _ in given).items() if count > 1]:
        raise expected(f"{twice[0]} once", f"it twice in {spec!r}")
    for key, option in _WEIGHTS.items():
        if key in arguments:  # else a report would call them random
            raise expected(f"weights by {option}", f"{key} among the arguments of {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "april_vit":
            return _construct(name, AprilViT, arguments)
        import timm

        if not timm.is_model(name):
            begun = timm.list_models(f"{name}*") or timm.list_models(f"*{name[:12]}*")
            begun = begun or get_close_matches(name, timm.list_models(), n=3)
            near = ", ".join(begun[:3]) if name else ""
            raise expected(
                "a timm model name or april_vit",
                repr(name),
                f"Close to it: {near}." if near else "",
            )
        if arguments.get("pos_embed", "") is None:
            arguments["pos_embed"] = "none"  # its own word
        if gone := [key for key, value in arguments.items() if value is None]:
            raise expected(
                f"a value for {gone[0]}", "none, which timm leaves out for its default",
                "Leave the argument out, or give what the model's constructor takes.",
            )  # fmt: skip
        return _construct(name, timm.create_model, {"model_name": name, **arguments}, pretrained)


def _argument(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key.isidentifier():
        raise expected("model arguments as key=value, parted by commas", repr(item), _SIZES)
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return key, words[text.lower()]
    if size := re.fullmatch(
        r"(\d+)[xX\u00d7](\d+)", text
    ):  # height x width, for images that are not square
        return key, (int(size[1]), int(size[2]))
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
        sizes = any(k.endswith("size") and type(v) in (str, float) for k, v in arguments.items())
        raise expected(what, f"{given or 'none'} ({first})", _SIZES if sizes else "") from error


_WEIGHTS = {"pretrained": "--pretrained", "checkpoint_path": "--checkpoint FILE"}
_SIZES = "A size of height and width is written img_size=32x64, a square one img_size=32."


class DefenseLeftOut(str):
    """A note on what was left out of a protected model's weights, for a bare one."""


def load_checkpoint(model: nn.Module, path: str | Path) -> tuple[str, ...]:
    """Load weights strictly, from safetensors or a torch file without code (`weights_only`).

    Names may have a wrapper's prefix (`module.`, `model.`, `_fsdp_wrapped_module.`), and what
    vitguard added to a protected model is left out of a bare one. Two things may differ: a file
    without any head, or with one for other classes, leaves the model's own, and absolute positions
    of another square grid are resampled as timm does.

    Returns:
        What was not taken as it is, in words for a report.

    Raises:
        InputError: A missing, foreign or compressed file, names or shapes that differ, tensors that
            are not dense or of another kind of number, values that are not finite; the model is
            then unchanged.
    """
    if Path(path).is_dir():
        raise expected(
            "a checkpoint file", f"the folder {path}",
            "Give the file in it that holds the weights, such as model.safetensors.",
        )  # fmt: skip
    if not Path(path).is_file():
        raise expected("a checkpoint file", f"no file at {path}")
    own, notes = dict(model.state_dict()), []
    stored = _in_order(read_checkpoint(Path(path), notes), own, path)
    state = _renamed(stored, own, path, notes)
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing and not unknown and missing == _head_names(model, own):
        notes.append(f"the head was drawn at random: the checkpoint has no {missing[0]}")
        state |= {name: own[name] for name in missing}
        missing = []
    if missing or unknown:
        words = [
            f"{len(n)} {w}, such as {n[0]}"
            for n, w in ((missing, "missing"), (unknown, "unknown"))
            if n
        ]
        if missing and not unknown:
            words.append(f"it has {', '.join(list(state)[:3])} ..." if state else "it has none")
        masked = any(name.startswith(("decoder_", "mask_token")) for name in unknown)
        raise expected(
            "a checkpoint of this model", f"{path} ({'; '.join(words)})",
            "It is of masked pre-training (MAE): save its encoder alone, without decoder_... and "
            "mask_token." if masked else "",
        )  # fmt: skip
    _resample_positions(model, state, own, notes)
    _keep_own_head(model, state, own, notes)
    wrong = next((k for k in own if state[k].shape != own[k].shape), None)
    if wrong:
        raise expected(
            f"{wrong} of shape {tuple(own[wrong].shape)}",
            f"{tuple(state[wrong].shape)} in {path}",
            "Give the model the arguments it was trained with.",
        )
    state = {k: _as_own(k, state[k], own[k], path) for k in own}
    model.load_state_dict(state, strict=True)
    return tuple(notes)


def _in_order(
    stored: Mapping[Any, Any], own: Mapping[str, Tensor], path: object
) -> Mapping[Any, Any]:
    """Give arrays without names those of the model's state dict, in its order."""
    if not stored or any(k != f"{UNNAMED}{i}" for i, k in enumerate(stored)):
        return stored
    if len(stored) != len(own):
        raise expected(
            f"{len(own)} arrays, as the model's state dict", f"{len(stored)} in {path}",
            "Of a model that vitguard protected, store them by name: its weights are among them.",
        )  # fmt: skip
    return dict(zip(own, stored.values(), strict=True))


def _renamed(
    stored: Mapping[Any, Any], own: Mapping[str, Tensor], path: object, notes: list[str]
) -> dict[str, Tensor]:
    """Return the file's tensors by the model's names, wrappers and prefixes taken off."""
    named: dict[str, Tensor] = {}
    for key, value in stored.items():
        if isinstance(value, Tensor):
            name = canonical_name(_without_wrappers(str(key)))
            if name in named:
                raise expected("each weight once", f"{name} under two names in {path}")
            named[name] = value
    if named.get("n_averaged", torch.ones(1)).dim() == 0 and "n_averaged" not in own:
        del named["n_averaged"]  # the counter of torch's AveragedModel
    prefix = _prefix(named, own, path)
    found = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
    if outside := sorted(k for k in named if not k.startswith(prefix)):
        notes.append(f"{len(outside)} tensors outside {prefix!r} left out, such as {outside[0]}")
    added = [k for k in found if k.startswith("vitguard.") and k not in own]
    if added and not any(k.startswith("vitguard.") for k in own):
        said = f"{len(added)} tensors of a defense left out, such as {added[0]}"
        notes.append(DefenseLeftOut(said))
        found = {k: v for k, v in found.items() if k not in added}
    return found


def _without_wrappers(name: str) -> str:
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def _prefix(named: Mapping[str, Tensor], own: Mapping[str, Tensor], path: object) -> str:
    """Return what stands before the model's names in a file: the one that finds most of them."""
    counts: Counter[str] = Counter({"": sum(k in named for k in own)})
    for key in named:
        parts = key.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in own:
                counts[".".join(parts[:cut]) + "."] += 1
    best = max(counts.values())
    if counts[""] == best:
        return ""
    several = sorted(p for p, count in counts.items() if count == best)
    if len(several) > 1:
        raise expected(
            "one model in the checkpoint", f"several prefixes in {path}: {', '.join(several)}",
            "Save the one you mean, its prefix removed.",
        )  # fmt: skip
    return several[0]


def _head_names(model: nn.Module, own: Mapping[str, Tensor]) -> list[str]:
    try:
        heads = Anatomy.of(model).head
    except UnsupportedModel:
        return []
    return sorted(k for k in own if any(k.startswith(f"{head}.") for head in heads))


def _keep_own_head(
    model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor], notes: list[str]
) -> None:
    """Put the model's own layers in the place of those that tell other classes apart."""
    heads = set(_head_names(model, own))
    other = {k for k in own if state[k].shape != own[k].shape}
    layers = {k.rpartition(".")[0] for k in other}
    whole = {k for k in own if k.rpartition(".")[0] in layers}
    counts = {state[k].shape[:1] for k in other}
    alike = all(state[k].shape[1:] == own[k].shape[1:] and state[k].dim() for k in other)
    if other and other <= heads and other == whole and alike and len(counts) == 1:
        (count,) = counts.pop()
        notes.append(f"the head was drawn at random: that of the checkpoint is for {count} classes")
        state |= {name: own[name] for name in other}


def _resample_positions(
    model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor], notes: list[str]
) -> None:
    """Bring absolute positions of another square grid to the model's, as timm does."""
    try:
        anatomy = Anatomy.of(model)
    except UnsupportedModel:
        return
    name = anatomy.positions
    if name is None or name not in own or state[name].shape == own[name].shape:
        return
    given, prefix = state[name], anatomy.position_prefix
    side = math.isqrt(max(given.shape[1] - prefix, 0)) if given.dim() == 3 else 0
    fits = given.dim() == 3 and given.shape[0] == 1 and given.shape[2] == own[name].shape[2]
    if not fits or side < 1 or side * side != given.shape[1] - prefix or given.layout != _DENSE:
        return  # the error that follows names both shapes
    if not given.is_floating_point() or given.dtype.itemsize < 2:
        return
    from timm.layers import resample_abs_pos_embed

    state[name] = resample_abs_pos_embed(
        given.float(), list(anatomy.grid), [side, side], num_prefix_tokens=prefix
    )
    rows, columns = anatomy.grid
    notes.append(f"positions were resampled from {side} x {side} to {rows} x {columns} patches")


_DENSE = torch.strided


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
        held = torch.zeros(1, device=name)
        held.item()  # the meta device holds no values
        return held.device
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
