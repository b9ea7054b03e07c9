"""Models inside other libraries' wrappers: which one to protect, and tensors that are spread."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitguard.defenses.protection import Protection
from vitguard.errors import Incompatible, InputError, UnsupportedModel, expected
from vitguard.vit import Anatomy

__all__ = ["anatomy_of", "bare", "gathered", "require_bare", "require_values", "require_whole"]


def bare(model: nn.Module) -> nn.Module:
    """Return the model that defenses go on: that inside a PEFT model, else `model` itself.

    Raises:
        InputError: It is distributed, compiled or protected already.
    """
    if not isinstance(model, nn.Module):
        raise expected("an nn.Module", type(model).__name__)
    require_bare(model, "Protect the model first, then compile or distribute it.")
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        raise InputError(
            "Expected a model that is not compiled, got one after compile(): hooks added now would "
            "be ignored. Protect the model first, then compile it."
        )
    if Protection.of(model) is not None:
        raise expected("a model that is not protected yet", "one that is", "Call guard.remove().")
    if any(c.__module__.startswith("peft.") for c in type(model).__mro__):
        return model.get_base_model()  # type: ignore[operator]
    return model


def require_bare(model: nn.Module, do: str = "") -> None:
    """Raise InputError where a model is compiled or distributed by a module around it.

    Args:
        do: What to do with a wrapped one; by default to give what is inside.
    """
    for inside in ("_orig_mod", "module"):
        if isinstance(getattr(model, inside, None), nn.Module):
            raise expected(
                "the bare model", f"{type(model).__name__} around it",
                do or f"Give the model inside, model.{inside}.",
            )  # fmt: skip


def anatomy_of(model: nn.Module) -> Anatomy:
    """Return `Anatomy.of`; of a model around a Vision Transformer say which part to protect.

    Raises:
        UnsupportedModel: None was recognised, or it is a part of `model`.
    """
    try:
        return Anatomy.of(model)
    except UnsupportedModel:
        for name, part in model.named_modules():
            if name and next(part.children(), None) is not None and _recognised(part):
                raise UnsupportedModel(
                    f"Expected a Vision Transformer, got {type(model).__name__} with one at "
                    f"{name}. Protect that part: protect({_written(name)}, ...)."
                ) from None
        raise


def _written(name: str) -> str:
    """Return a part of `model` as Python writes it: parts of a Sequential by their number."""
    parts = (f"[{part}]" if part.isdecimal() else f".{part}" for part in name.split("."))
    return f"model{''.join(parts)}"


def _recognised(part: nn.Module) -> bool:
    try:
        Anatomy.of(part)
    except InputError:
        return False
    return True


def require_values(model: nn.Module) -> None:
    """Raise Incompatible if a tensor of the model is on the meta device."""
    held = (*model.named_parameters(), *model.named_buffers())
    if empty := next((name for name, t in held if t.is_meta), None):
        raise Incompatible(
            f"Expected a model with values, got {empty} on the meta device: a defense of the model "
            "starts from them. Call to_empty and load_state_dict first, then protect."
        )


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that FSDP spread over processes; all of them must ask for it."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def require_whole(model: nn.Module, what: str) -> None:
    """Raise Incompatible where FSDP has spread a model's parameters over processes.

    Args:
        what: What needs them whole, for the message.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.Tensor) and hasattr(parameter, "full_tensor"):
            raise Incompatible(
                f"Expected whole parameters for {what}, got {name} spread over processes by FSDP. "
                "Use DistributedDataParallel, or one process."
            )
