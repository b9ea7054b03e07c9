"""What a server can write into adapters where the client keeps its own frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitguard.core import Bins
from vitguard.core.parameters import canonical_tensors
from vitguard.errors import NotApplicable
from vitguard.models import normalization_of
from vitguard.threats.crafts.channels import natural_images
from vitguard.threats.crafts.homes import homes_of
from vitguard.vit import Anatomy, canonical_name

__all__ = ["NO_PLACE", "feature_bins", "written_beside"]

NO_PLACE = (
    "trains no adapter that reads what an MLP reads: nothing tells a single token from a mixture"
)
"""Why there are no bins beside weights that a server did not write."""

_STEEP = 1000.0  # width of a typical bin, in inputs of the activation
_FAINT = 1e-3  # what the adapter adds to a token at most, relative to what it reads


def feature_bins(model: nn.Module) -> list[Bins]:
    """Return the bins in the first adapter that reads what an MLP reads: tokens after a norm."""
    try:
        homes = homes_of(model, Anatomy.of(model))
    except NotApplicable:
        return []
    beside = [home for home in homes if home.kind == "parallel"][:1]
    return [
        Bins(home.layer, torch.arange(home.rows)[None], 0, None, "feature", home.out)
        for home in beside
        if f"{home.layer}.bias" in canonical_tensors(model)  # it holds the thresholds
    ]


def written_beside(
    model: nn.Module, beside: Sequence[Bins], generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the model's state dict with thresholds in one adapter, and nothing else changed.

    They are quantiles of what drawn images give along the direction in which they differ most.
    """
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    for bins in beside:
        written = _thresholds(model, bins, generator)
        for name, t in state.items():
            if canonical_name(name) in written:
                t.copy_(written[canonical_name(name)].expand_as(t))
    return state


def _thresholds(model: nn.Module, bins: Bins, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the weights of one adapter by canonical name."""
    seen = _features(model, bins.layer, generator).flatten(0, 1)
    mean = seen.mean(0)
    line = torch.linalg.svd(seen - mean, full_matrices=False).Vh[0]
    measured = seen @ line
    cuts = torch.quantile(measured, torch.arange(bins.rows.numel()).double() / bins.rows.numel())
    cuts[0] = measured.min() - measured.std()
    typical = float(cuts.diff()[1:].median() if len(cuts) > 2 else measured.std())
    steep = _STEEP / max(typical, 1e-9)
    most = steep * float(measured.max() - cuts[0]) * len(cuts)
    out = torch.randn(seen.shape[1], generator=generator, dtype=torch.float64)
    out *= _FAINT * float(seen.norm(dim=1).mean()) / (most * float(out.norm()))
    return {
        f"{bins.layer}.weight": steep * line,
        f"{bins.layer}.bias": -steep * cuts,
        f"{bins.out}.weight": out[:, None],
    }


def _features(
    model: nn.Module, layer: str, generator: torch.Generator
) -> Float[Tensor, "images patches width"]:
    """Return what a layer reads at the patches of drawn images, in float64."""
    anatomy, like = Anatomy.of(model), next(model.parameters())
    images = natural_images(anatomy, normalization_of(model), generator)
    model = copy.deepcopy(model).eval()
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for part in images.split(8):
            model(part.to(like))
    return torch.cat(seen)[:, anatomy.prefix_tokens :].cpu().double()
