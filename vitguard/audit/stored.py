"""Files that federated frameworks store, as updates: whole weights, differences, ciphertext."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from vitguard.core import Update
from vitguard.defenses.encryption.wire import MAGIC as ENCRYPTED
from vitguard.defenses.encryption.wire import count_values as encrypted_values
from vitguard.defenses.masking.wire import MAGIC as MASKED
from vitguard.defenses.masking.wire import count_values as masked_values
from vitguard.errors import InputError, expected
from vitguard.models import DefenseLeftOut, load_checkpoint
from vitguard.tensor_files import is_saved_update, read_checkpoint
from vitguard.vit import Anatomy, canonical_name

__all__ = ["stored_update"]

_CIPHERTEXT = {ENCRYPTED: "encryption", MASKED: "masking"}


def stored_update(
    path: str | Path,
    model: nn.Module,
    *,
    before: str | Path | None = None,
    kind: Literal["gradient", "difference"] | None = None,
    batch_size: int | None = None,
    local_steps: int | None = None,
    learning_rate: float | None = None,
    optimizer: str | None = None,
) -> Update:
    """Return the update in a file that a client, a server or a framework wrote.

    Taken are what `Update.save` wrote, which says all else itself; whole weights after a step, with
    those `before` it (a torch state dict, NVFlare's `FL_global_model.pt`, safetensors, a NumPy
    archive with names, or without them in the order of the state dict, as Flower lists arrays); a
    gradient or difference in such a file, where its `kind` is said; and an encrypted message or
    sum, or a client's masked values, of the whole model, of which nothing can be read.

    Args:
        model: The model it belongs to; with `before` it is loaded with these weights.
        before: File of the weights before the step.
        kind: What the file holds, if it is no whole weights.
        batch_size: Images behind it.
        local_steps, learning_rate, optimizer: How a difference was made, as far as it is known.

    Raises:
        InputError: There is no such file, it holds something else, or a fact is missing or said
            twice.
    """
    file = Path(path)
    if not file.is_file():
        raise expected("an update in a file", f"no file at {path}")
    facts = {
        "kind": kind, "batch_size": batch_size, "local_steps": local_steps,
        "learning_rate": learning_rate, "optimizer": optimizer,
    }  # fmt: skip
    said = {name: value for name, value in facts.items() if value is not None}
    if is_saved_update(file):
        if both := [*said, *(["before"] if before is not None else [])]:
            raise expected("a saved update, which says itself how it was made", f"{both[0]} too")
        return Update.load(file)
    if batch_size is None:
        raise expected(
            f"how many images are behind the update in {path}", "nothing", "Give --batch-size."
        )
    with file.open("rb") as opened:
        scheme = _CIPHERTEXT.get(opened.read(4))
    if scheme is not None:
        if before is not None:
            raise expected("whole weights beside those before", f"ciphertext in {path}")
        _check_whole(file, scheme, model)
        names = [canonical_name(n) for n, _ in model.named_parameters()]
        reason = f"ciphertext ({scheme})"
        return Update({}, **said, sealed=dict.fromkeys(names, reason))
    if before is not None and kind is not None:
        raise expected("either its kind or the weights before it", "both")
    if before is not None:
        return Update(_difference(file, before, model), **{**said, "kind": "difference"})
    tensors = {canonical_name(str(k)): t for k, t in read_checkpoint(file).items()}
    if kind is None:
        raise expected(
            "an update", f"tensors without a word of what they are in {path}",
            "Of whole weights, give those before the step as well: --before FILE. Of a gradient or "
            "a difference, say so: --update gradient or difference.",
        )  # fmt: skip
    _check_any(tensors, model, file)
    return Update({n: t for n, t in tensors.items() if isinstance(t, Tensor)}, **said)


def _check_any(tensors: Mapping[str, object], model: nn.Module, file: Path) -> None:
    """Refuse a file without any tensor of the model: attacks would be blocked by its absence."""
    own = {canonical_name(n) for n, _ in model.named_parameters()}
    if not any(n in own and isinstance(t, Tensor) for n, t in tensors.items()):
        held = ", ".join(f"{n:.40} ({type(t).__name__})" for n, t in list(tensors.items())[:3])
        raise expected(
            "tensors by the model's names", f"{held or 'nothing'} in {file}",
            "Of ciphertext store the bytes alone: Path(FILE).write_bytes(message).",
        )  # fmt: skip


def _check_whole(file: Path, scheme: str, model: nn.Module) -> None:
    """Refuse a message that others can read, and one of a part: the rest was sent beside it."""
    data = file.read_bytes()
    count = (masked_values if scheme == "masking" else encrypted_values)(data)
    if count is None:
        raise expected(
            "masked values of a client, or an encrypted message", f"another message in {file}",
            "A masked sum is read by the server: save what it opened, by Update.save.",
        )  # fmt: skip
    positions = Anatomy.of(model).positions  # which may be fixed, and then do not leave
    sizes = {canonical_name(n): p.numel() for n, p in model.named_parameters()}
    least = sum(size for name, size in sizes.items() if name != positions)
    if count < least:
        raise expected(
            f"ciphertext of the whole model, {least} values", f"{count} values in {file}",
            "What was sent beside it is not in the file: keep the whole update, by Update.save.",
        )  # fmt: skip


def _difference(after: Path, before: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """Return what two files of whole weights differ by; the model then holds those before."""
    later = copy.deepcopy(model)
    for path, own in ((before, model), (after, later)):
        # what a defense added is no part of the bare model: its change is taken below
        if notes := [n for n in load_checkpoint(own, path) if not isinstance(n, DefenseLeftOut)]:
            raise InputError(
                f"Expected all weights of the model in {path}, got others: {'; '.join(notes)}. A "
                "difference needs both files whole."
            )
    first, second = model.state_dict(), later.state_dict()
    moved = {canonical_name(n): second[n] - t for n, t in first.items() if t.is_floating_point()}
    if not any(bool(t.any()) for t in moved.values()):
        raise expected(
            "weights that a step has changed", f"the same in {before} and {after}",
            "Give those before the step by --before, and those after it by --update-file.",
        )  # fmt: skip
    start, end = _added(before), _added(after)
    return moved | {n: end[n] - t for n, t in start.items() if n in end}


def _added(path: str | Path) -> dict[str, Tensor]:
    """Return the weights that defenses added to a model, of those in a file."""
    found = {canonical_name(str(k)): t for k, t in read_checkpoint(Path(path)).items()}
    return {
        n: t
        for n, t in found.items()
        if n.startswith("vitguard.") and isinstance(t, Tensor) and t.is_floating_point()
    }
