"""What a server can write into adapters where the client keeps its own frozen weights."""

from __future__ import annotations

import copy

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

__all__ = ["feature_bins", "features_of", "written_beside"]

_STEEP = 1000.0  # width of a typical bin, in inputs of the activation
_FAINT = 1e-3  # what the adapter adds to a token at most, relative to what it reads


def feature_bins(model: nn.Module, anatomy: Anatomy) -> list[Bins]:
    """Return the bins in the first adapter that reads what an MLP reads: tokens after a norm.

    Raises:
        NotApplicable: There is no such adapter.
    """
    for home in homes_of(model, anatomy):
        if home.kind == "parallel":
            rows = torch.arange(home.rows)[None]
            return [Bins(home.layer, rows, 0, None, "feature", home.out)]
    raise NotApplicable(
        "the client keeps its own frozen weights, and trains no adapter that reads what an MLP "
        "reads: nothing tells a single token from a mixture there"
    )


def written_beside(
    model: nn.Module, bins: Bins, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the model's state dict with thresholds in one adapter, and nothing else changed.

    They are quantiles of what drawn images give along the direction in which they differ most.
    """
    seen = features_of(model, bins.layer, generator).flatten(0, 1)
    mean = seen.mean(0)
    line = torch.linalg.svd(seen - mean, full_matrices=False).Vh[0]
    measured = seen @ line
    cuts = torch.quantile(measured, torch.arange(bins.rows.numel()).double() / bins.rows.numel())
    cuts[0] = measured.min() - measured.std()
    steep = _STEEP / float(cuts.diff()[1:].median() if len(cuts) > 2 else measured.std())
    most = steep * float(measured.max() - cuts[0]) * len(cuts)
    out = torch.randn(seen.shape[1], generator=generator, dtype=torch.float64)
    out *= _FAINT * float(seen.norm(dim=1).mean()) / (most * float(out.norm()))
    named = canonical_tensors(model)
    if f"{bins.layer}.bias" not in named:
        raise NotApplicable(f"{bins.layer} has no bias for a threshold")
    written = {
        f"{bins.layer}.weight": (steep * line).expand_as(named[f"{bins.layer}.weight"]),
        f"{bins.layer}.bias": -steep * cuts,
        f"{bins.out}.weight": out[:, None].expand_as(named[f"{bins.out}.weight"]),
    }
    state = model.state_dict()
    return {
        name: written[canonical_name(name)].to(t, copy=True)
        if canonical_name(name) in written
        else t.detach().clone()
        for name, t in state.items()
    }


def features_of(
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
