"""What the contracts try a defense on: a small model, a batch, an update beside the plain one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitguard.core import Update
from vitguard.defenses.base import Defense
from vitguard.errors import Unprotected
from vitguard.guard import Guard, protect
from vitguard.vit import Anatomy, canonical_parameters

__all__ = [
    "SIZES", "batch", "beside", "embedded", "first_difference", "guarded", "inputs", "names",
    "require_refused", "size_for", "small_model",
]  # fmt: skip

SIZES = (1, 3)
"""Batch sizes of the updates that are compared: what reads one wrongly shows at two.

A defense that lets no small update leave (`least_batch`) is tried on the smallest that it does.
"""


def require_refused(act: object, what: str) -> None:
    """Raise AssertionError where a call is not refused as unprotected."""
    assert callable(act)
    try:
        act()
    except Unprotected:
        return
    except Exception as error:
        raise AssertionError(
            f"{what} breaks with {type(error).__name__}, not Unprotected: {error}"
        ) from error
    raise AssertionError(f"{what} is not refused")


def size_for(defense: Defense, wanted: int = 2) -> int:
    """Return the images of a small update that the defense lets leave."""
    return max(wanted, defense.least_batch(Anatomy.of(small_model())))


def names() -> list[str]:
    """Return the names of the small model's parameters."""
    return list(canonical_parameters(small_model()))


def beside(defense: Defense, size: int) -> tuple[Guard, Update, Update]:
    """Return a guard, the public model's update, and the one under the defense, of one batch."""
    guard = guarded(defense)
    with guard.ungated():
        update = guard.update(*inputs(size))
    public = guard.public_model().train()
    for parameter in public.parameters():
        parameter.requires_grad_(True)
    return guard, protect(public, []).update(*inputs(size)), update


def embedded(model: nn.Module, where: str | None, images: Tensor) -> Tensor:
    """Return the sequence that the blocks get in training."""
    caught: list[Tensor] = []
    blocks = model.get_submodule("blocks.0")
    handle = blocks.register_forward_pre_hook(lambda module, args: caught.append(args[0].detach()))
    try:
        with _released(model), torch.no_grad():
            model.train()(images * 2 - 1)
    finally:
        handle.remove()
    return caught[0]


@contextmanager
def _released(model: nn.Module) -> Iterator[None]:
    if getattr(model, "vitguard", None) is None:
        yield
        return
    with Guard.of(model).rehearsing():
        yield


def guarded(defense: Defense) -> Guard:
    """Return the guard of a small model under a defense, with draws that repeat."""
    model = small_model().train()
    return protect(model, [defense], generator=torch.Generator().manual_seed(0))


_BUILT: dict[str, nn.Module] = {}


def small_model() -> nn.Module:
    """Return a ViT of one block, four patches and a class token; a copy of one that is kept."""
    if "vit" not in _BUILT:
        from timm.models.vision_transformer import VisionTransformer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = VisionTransformer(
                img_size=8, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=3
            )
            with torch.no_grad():  # zero biases and unit gammas would hide mistakes
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        _BUILT["vit"] = model
    return copy.deepcopy(_BUILT["vit"])


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Return images in [0, 1], shape (size, 3, 8, 8), and their labels."""
    images = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(size) % 3


def inputs(size: int) -> tuple[Tensor, Tensor]:
    """Return the same as the model takes it, in [-1, 1]."""
    images, labels = batch(size)
    return images * 2 - 1, labels


def first_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str | None:
    """Return the first name whose tensors differ, None where all are alike."""
    for name in (*one, *other):
        if name not in one or name not in other or not torch.equal(one[name], other[name]):
            return name
    return None
