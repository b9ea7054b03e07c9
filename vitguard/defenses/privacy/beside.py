"""Layers beside a private model whose gradient would be plain: a head behind it, a stem before it.

What such a layer learns of a record changes the other examples' gradients at the next step, so that
clipping bounds nothing: it must be a part of the private model, or frozen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from vitguard.defenses.privacy.tape import Tape
from vitguard.errors import Unprotected

__all__ = ["refuse_stem", "watch_heads"]

_MARK = "vitguard private pass"


def refuse_stem(tensors: Iterable[Tensor]) -> None:
    """Raise Unprotected if what a private pass is given was computed by something trained."""
    for tensor in tensors:
        if _reaches(tensor, lambda node: isinstance(_leaf(node), nn.Parameter)):
            raise _beside("a trained layer before it")


def watch_heads(model: nn.Module, output: Any, tape: Tape) -> Any:
    """Refuse from now on modules with parameters of their own that take what the model made.

    Returns:
        A handle: `remove()` it once the step was taken. It ends with the tape too.
    """
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            node: Any = tensor.grad_fn  # torch types `metadata` as a method
            node.metadata[_MARK] = id(tape)
    handle = register_module_forward_hook(_look(model, weakref.ref(tape)), with_kwargs=True)
    weakref.finalize(tape, handle.remove)
    return handle


def _look(model: nn.Module, tape: weakref.ref[Tape]) -> Callable[..., None]:
    own = {id(m) for m in model.modules()}
    trained = {id(p) for p in model.parameters()}

    def look(module: nn.Module, args: Any, kwargs: Any, made: Any) -> None:
        now = tape()
        if now is None or id(module) in own or not is_grad_enabled():
            return
        if all(id(p) in trained or not p.requires_grad for p in module.parameters()):
            return
        leaves = {id(root.leaf) for root in now.entered()}  # of what a hook took from inside

        def of_pass(node: Any) -> bool:
            return node.metadata.get(_MARK) == id(now) or id(_leaf(node)) in leaves

        if any(_reaches(t, of_pass) for t in tree_leaves((args, kwargs))):
            raise _beside(f"a {type(module).__name__} behind it")

    return look


def _leaf(node: Any) -> Any:
    """Return the tensor whose gradient a node of the graph adds up, if it does that."""
    return getattr(node, "variable", None)


def _reaches(tensor: Any, wanted: Callable[[Any], bool]) -> bool:
    """Whether the graph of a tensor has a node of some kind."""
    start = tensor.grad_fn if isinstance(tensor, Tensor) else None
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if wanted(node):
            return True
        following = [n for n, _ in node.next_functions if n not in seen]
        seen.update(following)
        waiting.extend(following)
    return False


def _beside(got: str) -> Unprotected:
    return Unprotected(
        f"Expected all that is trained in the private model, got {got} with parameters of its own: "
        "their gradient would be neither clipped nor noised, and what they learn voids the bound "
        "on the others. Make them the model's own and protect that (timm model.reset_classifier, "
        "or a module that holds both), or freeze them: requires_grad_(False)."
    )
