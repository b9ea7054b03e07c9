"""What the head of a model reads, where it is an average of all tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vitguard.attacks.equations.head import linear_heads
from vitguard.vit import Anatomy, logits_of

__all__ = ["averages", "pools_first"]

_SAME = 1e-3  # relative difference of gradients that are the same


def averages(anatomy: Anatomy) -> bool:
    """Whether the head reads the mean of the patches' tokens and nothing else."""
    return anatomy.pooling == "avg"


def pools_first(model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether all patches' tokens have one gradient: the last norm follows the average.

    Where it comes before, the gradient of each token is divided by the size of that token.
    """
    model = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    modules = dict(model.named_modules())
    seen: list[Tensor] = []

    def gives(_: nn.Module, __: Any, output: Any) -> Any:
        tokens = output[0] if isinstance(output, tuple) else output
        seen.append(tokens.detach().requires_grad_())
        return (seen[0], *output[1:]) if isinstance(output, tuple) else seen[0]

    modules[anatomy.blocks[-1].name].register_forward_hook(gives)
    like = next(model.parameters())
    image = torch.randn(1, anatomy.channels, *anatomy.image_size, generator=generator)
    with torch.enable_grad():
        for head in linear_heads(model, anatomy):  # a fresh one may be zero
            weight = modules[head].weight
            assert isinstance(weight, Tensor)
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
        said = logits_of(model(image.to(like)))
        worth = torch.randn(said.shape, generator=generator).to(said)
        (slope,) = torch.autograd.grad((said * worth).sum(), seen[0])
    of_patches = slope[0, anatomy.prefix_tokens :]
    apart = (of_patches - of_patches[:1]).norm(dim=1).max()
    return bool(apart <= _SAME * of_patches[0].norm())
