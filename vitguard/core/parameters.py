"""Names of parameters: the base model's, whatever wraps it."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor, nn

__all__ = ["canonical_name", "canonical_parameters", "canonical_tensors"]

_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "_module.")


@lru_cache(maxsize=65_536)  # a model's names are asked for many times in each step
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


def canonical_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a model, wrapped or not, by canonical name."""
    stores = (model.named_buffers(), model.named_parameters())
    return {canonical_name(k): t for store in stores for k, t in store}
