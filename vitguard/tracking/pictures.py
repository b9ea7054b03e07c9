"""Pictures of a training step: what the model saw of each image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitguard.core import Normalization
from vitguard.errors import expected

if TYPE_CHECKING:
    from vitguard.guard import Guard

__all__ = ["beside", "shuffled_at", "what_the_model_saw"]


def what_the_model_saw(guard: Guard, images: Tensor) -> Tensor:
    """Return the images with patches where the last draw of a shuffle moved them.

    As they are if the model is not training: nothing is shuffled then.
    """
    source = guard.truth().get("source") if guard.model.training else None
    if source is None or source.shape[0] != len(images):
        return images.detach()
    patches = guard.anatomy.patchify(images.detach())
    source = source.to(patches.device)[..., None].expand_as(patches)
    return guard.anatomy.unpatchify(patches.gather(1, source))


def shuffled_at(
    guard: Guard, images: Tensor, ratio: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Return the images with a share of their patches permuted by a draw of its own."""
    from vitguard.defenses.shuffle import masks
    from vitguard.draws import Draws

    if not 0 <= ratio <= 1:
        raise expected("ratio in [0, 1]", ratio)
    anatomy = guard.anatomy
    draws = Draws(generator or torch.Generator().manual_seed(0))
    keys = draws.keys(len(images))
    mask = masks.uniform_masks(draws, keys, anatomy.patches, int(ratio * anatomy.patches + 1e-9))
    source = masks.permute_inside(draws, keys, mask).to(images.device)
    patches = anatomy.patchify(images.detach())
    return anatomy.unpatchify(patches.gather(1, source[..., None].expand_as(patches)))


def beside(left: Tensor, right: Tensor, normalization: Normalization | None) -> Tensor:
    """Return one picture, a row for each image: it, and the other version of it."""
    pairs = torch.cat(list(torch.cat([left.detach(), right], dim=-1)), dim=-2)
    pixels = normalization.invert(pairs) if normalization is not None else pairs
    return pixels.clamp(0, 1).cpu()
