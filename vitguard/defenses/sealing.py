"""What defenses of the update share: which tensors to hide, and refusal of what has no value."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vitguard.core import Update
from vitguard.defenses.base import Defense, traits_of
from vitguard.errors import Incompatible, Unprotected, expected
from vitguard.selectors import require_all_match
from vitguard.vit import Anatomy, canonical_parameters

__all__ = ["require_finite", "require_selection", "selected"]


def require_selection(
    select: str, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense], verb: str
) -> None:
    """Refuse a selection that hides nothing of what the stack sends.

    Raises:
        Incompatible: Nothing is selected.
        InputError: The selection cannot be read, or a part of it matches no parameter.
    """
    sizes = {n: p.numel() for n, p in canonical_parameters(model).items()}
    require_all_match(anatomy, select, sizes)
    if traits_of(stack, anatomy).positions != "learnable":
        sizes.pop(anatomy.positions or "", None)
    if not anatomy.select(select, sizes):
        raise Incompatible(f"Expected parameters to {verb}, got none for {select!r}.")


def require_finite(update: Update) -> None:
    """Refuse an update with infinite entries, or some that are no numbers.

    Raises:
        InputError: There are some; the message names the tensor.
    """
    for name, tensor in update.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise expected(
                f"finite entries in {name}", "inf or NaN",
                "Nothing was released: leave this update out, or take a smaller learning rate.",
            )  # fmt: skip


def selected(
    select: str, update: Update, anatomy: Anatomy, verb: str, done: str
) -> tuple[Update, list[str]]:
    """Return the names to hide, and the update without the integers among them.

    Counters of a whole state dict fit no ciphertext and no mask, and must not be plain.

    Raises:
        Unprotected: The update contains nothing that the selection names.
    """
    names = anatomy.select(select, update.tensors)
    chosen = [n for n in names if update.tensors[n].is_floating_point()]
    integers = dict.fromkeys((n for n in names if n not in chosen), f"an integer, not {done}")
    if not chosen:
        raise Unprotected(f"Expected tensors to {verb}, got none for {select!r}.")
    return update.seal(integers), chosen
