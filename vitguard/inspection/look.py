"""Looking at a model: its weights, and one pass of the client's own images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.core import Loss, tensors_by_name
from vitguard.errors import Incompatible, expected
from vitguard.inspection.memory import Memory, Traces
from vitguard.inspection.recorder import Recorder
from vitguard.inspection.rows import finite, fresh_generator
from vitguard.inspection.signs import largest
from vitguard.inspection.structure import structure_signs
from vitguard.inspection.verdict import Inspection, Sign
from vitguard.vit import Anatomy, canonical_name, logits_of

__all__ = [
    "buffer_signs",
    "inspect_model",
    "inspect_weights",
    "load_exactly",
    "require_blocks",
    "weights_of",
]

_NAMED = 3
"""Buffers that a note names."""
NOTHING_TRAINED = "no parameter is trained: there is no gradient to look at"


def require_blocks(anatomy: Anatomy) -> None:
    """Raise Incompatible where the blocks are not known, in which crafts would stand."""
    if not anatomy.blocks:
        raise Incompatible(
            "Expected a model whose blocks are known, got one without: weights cannot be "
            "inspected. Give an Anatomy with blocks, or leave the inspection out."
        )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that a server sends, by the base model's name."""
    named = ((canonical_name(n), p.detach()) for n, p in model.named_parameters())
    return {n: p for n, p in named if not n.startswith("vitguard.")}


def buffer_signs(model: nn.Module) -> tuple[list[Sign], list[str]]:
    """Return what is seen of the buffers that a server sends, and a note on what is not.

    The statistics of batch norms in eval mode scale what passes, as weights do; no limit on them is
    known that honest ones keep.
    """
    own = dict(model.named_parameters()).keys()
    sent = {
        canonical_name(n): t.detach()
        for n, t in model.state_dict().items()
        if n not in own and not n.startswith("vitguard.") and t.is_floating_point()
    }
    if not sent:
        return [], []
    names = ", ".join([*sent][:_NAMED]) + (", ..." if len(sent) > _NAMED else "")
    count = "1 buffer was" if len(sent) == 1 else f"{len(sent)} buffers were"
    return largest("not finite", [(n, float(not finite(t))) for n, t in sent.items()]), [
        f"{count} searched for values that are no numbers, and for nothing else ({names})"
    ]


def load_exactly(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights into a model, by the base model's names.

    Raises:
        InputError: Names, shapes or types that the model does not have; nothing is changed.
    """
    own = {canonical_name(n): t for n, t in model.state_dict().items()}
    given = {canonical_name(n): t for n, t in tensors_by_name(weights).items()}
    for name, tensor in given.items():
        if name not in own:
            raise expected("weights by the model's names", repr(name))
        mine = own[name]
        if tensor.shape != mine.shape or tensor.dtype != mine.dtype:
            raise expected(
                f"{name} as {mine.dtype} of shape {tuple(mine.shape)}",
                f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            )
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def inspect_weights(
    weights: Mapping[str, Tensor],
    anatomy: Anatomy,
    memory: Memory,
    *,
    limit: float = 1.0,
    traces: Traces | None = None,
    numbers: bool = False,
) -> Inspection:
    """Look at weights alone: their structure, and how far they are from the last accepted ones.

    Args:
        traces: What `memory` makes of these weights, where that is known.
        numbers: Whether it is known that all their values are numbers.

    Raises:
        Incompatible: The model's blocks are not known.
    """
    require_blocks(anatomy)
    signs = structure_signs(weights, anatomy, fresh_generator(), numbers)
    found = Inspection(tuple(signs), limit=limit)
    if found.suspicious and "not finite" in {s.name for s in found.worst}:
        return found
    traces = memory.traces(weights, anatomy) if traces is None else traces
    return found.and_also(*memory.compare(traces))


def inspect_model(
    model: nn.Module,
    anatomy: Anatomy,
    images: Tensor,
    labels: Tensor,
    memory: Memory,
    *,
    loss: Loss = F.cross_entropy,
    limit: float = 1.0,
) -> Inspection:
    """Look at a model and at the gradient of a batch, which is computed for it and dropped."""
    found = inspect_weights(weights_of(model), anatomy, memory, limit=limit)
    found = found.and_also(*buffer_signs(model))
    if any(s.name == "not finite" and s.value for s in found.signs):
        return found
    recorder = Recorder(anatomy.prefix_tokens)
    handles = recorder.attach(model, anatomy)
    recorder.arm()
    try:
        with torch.enable_grad():
            trained = [p for p in model.parameters() if p.requires_grad]
            total = loss(logits_of(model(images)), labels)
            if not trained:
                return found.and_also((), [NOTHING_TRAINED])
            torch.autograd.grad(total, trained, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return found.and_also(recorder.signs(), recorder.notes())
