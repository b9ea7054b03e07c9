"""What a train function changed: differences by the model's own names, and back to what is sent."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from vitguard.errors import expected
from vitguard.guard import Guard
from vitguard.vit import canonical_name

__all__ = [
    "changes_of",
    "go_on",
    "local_of",
    "moved",
    "require_added",
    "spelled",
    "with_local",
]


def spelled(names: Iterable[str], own: Collection[str]) -> dict[str, str]:
    """Return how each of a model's own names is spelled in a message, for those that are in it.

    A compiled model and a PEFT model put a prefix before each name, and PEFT leaves the name of
    the adapter out of those that it saves.
    """
    short = {name.replace(".default.", "."): name for name in own}
    found: dict[str, str] = {}
    for name in names:
        bare = canonical_name(name)
        meant = bare if bare in own else short.get(bare)
        if meant is not None and found.setdefault(meant, name) != name:
            raise expected(f"{meant} once", f"it as {found[meant]} and as {name}")
    return found


def require_added(guard: Guard, names: Iterable[str]) -> None:
    """Raise InputError where the server does not share what a defense added to the model.

    Numbers of floating point: an unknown token, a head, positions that were drawn.
    """
    names = {*names}
    frozen = {n for n, p in guard.model.named_parameters() if not p.requires_grad}
    for name, tensor in guard.model.state_dict().items():
        added = name.startswith("vitguard.") and isinstance(tensor, Tensor)
        if added and tensor.is_floating_point() and name not in frozen and name not in names:
            raise expected(
                f"{name} among the weights that the server sent", "none",
                "Each client would go on with its own, and what it trains of it would be lost: "
                "protect the server's starting model with the same defenses of the model, and "
                "send its whole state dict.",
            )  # fmt: skip


def local_of(guard: Guard) -> dict[str, Tensor]:
    """Return what no client sends and each goes on from, by the model's own names.

    How far the defenses' schedules are, and parameters that a defense keeps local, such as
    withheld positions.
    """
    return {n: t.clone() for n, t in _kept(guard).items() if bool(t.isfinite().all())}


def go_on(guard: Guard, local: Mapping[str, Tensor]) -> None:
    """Take up what `local_of` returned of the guard of an earlier message."""
    for name, tensor in _kept(guard).items():
        if name in local and local[name].shape == tensor.shape:
            tensor.copy_(local[name])


def with_local(given: Mapping[str, Tensor], local: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of the weights that came which a client goes on from by itself.

    Args:
        given: Weights by the names in messages.
        local: What `local_of` returned.
    """
    own = {sent: local[name] for name, sent in spelled(given, local).items()}
    return {n: t.to(given[n].dtype) for n, t in own.items() if t.shape == given[n].shape}


def _kept(guard: Guard) -> dict[str, Tensor]:
    shared = guard.shared_names()
    trained = {n for n, p in guard.model.named_parameters() if p.requires_grad}
    return {
        canonical_name(n): t.detach()
        for n, t in guard.model.state_dict().items()
        if isinstance(t, Tensor)
        and canonical_name(n) not in shared
        and (n in trained or (n.startswith("vitguard.") and not t.is_floating_point()))
    }


def changes_of(
    guard: Guard, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the change of each tensor that is shared, by the model's own names; and the spelling.

    Args:
        before, after: Weights that came and that the train function returned, by the names in the
            messages.

    Raises:
        InputError: A tensor is missing or of another shape, or one changed of which the guard
            knows nothing: it would be lost.
    """
    require_added(guard, before)
    own = guard.shared_names()
    spelling = spelled(before, own)
    meant = {sent: name for name, sent in spelled(after, own).items()}
    after = {spelling.get(meant.get(n, n), n): t for n, t in after.items()}
    if missing := next((n for n in spelling.values() if n not in after), None):
        raise expected("all weights in the reply", f"none of {missing}")
    for name in spelling.values():
        if after[name].shape != before[name].shape:
            raise expected(f"{name} of shape {tuple(before[name].shape)}", tuple(after[name].shape))
    _require_known(guard.model, {*spelling.values()}, before, after)
    for name, sent in [*spelling.items()]:
        if not after[sent].is_complex():
            continue
        if not bool((after[sent] == before[sent]).all()):
            raise expected(
                f"{sent} unchanged, since no defense takes complex values", "a change",
                "Freeze it, or hold its two parts in a tensor of real numbers.",
            )  # fmt: skip
        del spelling[name]  # it stays as the server knows it
    return {n: _change(before[sent], after[sent]) for n, sent in spelling.items()}, spelling


def _require_known(
    model: nn.Module, shared: set[str], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    """Raise InputError where a tensor changed that is none of the model's: it is lost."""
    local = {canonical_name(n) for n in model.state_dict()}
    fixed = {canonical_name(n): b for n, b in model.named_buffers() if b.is_floating_point()}
    for name in sorted(after.keys() - shared):
        if name in before and name in fixed and not _alike(before[name], fixed[name]):
            raise expected(
                f"{name} from the server as the client's defense fixed it", "other values",
                "The server's model would keep values that no client trains with: protect its "
                "starting model with the same defenses of the model.",
            )  # fmt: skip
        kept = name in before and canonical_name(name) in local and not after[name].is_complex()
        if name.startswith("vitguard.") or kept:
            continue  # what a defense keeps local: it stays as the server knows it
        start, end = before.get(name), after[name]
        if start is None or start.shape != end.shape or not bool((start == end).all()):
            raise expected(
                f"{name} unchanged, which the protected model does not share", "a change",
                "It would be lost: protect a model that holds it, have the server send it with "
                "the others, or leave it out of the reply.",
            )  # fmt: skip


def _alike(sent: Tensor, own: Tensor) -> bool:
    """Whether they are the same up to rounding, such as that of a server's average."""
    if sent.shape != own.shape:
        return False
    own = own.detach().cpu()
    gap = (sent.double() - own.double()).abs()
    return bool((gap <= 1e-2 * own.double().square().mean().sqrt() + 1e-6).all())


def _change(before: Tensor, after: Tensor) -> Tensor:
    """Return the difference; that of whole numbers and truth values in whole numbers."""
    if after.is_floating_point():
        return after - (before if before.is_floating_point() else before.to(after.dtype))
    return after.long() - before.long()  # a server's average has made numbers of them


def moved(before: Tensor, change: Tensor) -> Tensor:
    """Return a tensor after a change, of the type it had."""
    if before.is_floating_point():
        return before + change.to(before.dtype)
    return (before.long() + change.long()).to(before.dtype)
