"""Passes of single parts of a model, which may be of features that nobody shuffled.

A pass of the whole model goes through the placing. A part behind it (a block, a norm, the head)
that is called by itself is followed back: what it is given must come from the placing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitguard.vit import Anatomy

__all__ = ["mark", "unwatch_parts", "unwatched_gradient", "watch_parts"]

_MARK = "vitguard shuffled"
_NEGATIVE = 1 << 63


@runtime_checkable
class Piece(Protocol):
    """What is asked of an installed shuffle."""

    anatomy: Anatomy

    def whole_pass(self) -> bool: ...
    def expose(self) -> None: ...


def mark(tensor: Tensor) -> None:
    """Note that what a tensor is computed from was shuffled."""
    node: Any = tensor.grad_fn  # torch types `metadata` as a method
    if node is not None:
        node.metadata[_MARK] = True


def watch_parts(piece: Piece, model: nn.Module) -> None:
    """Watch the parts behind the placing from now on, those too that came since."""
    for part in _parts(piece.anatomy, model):
        if not _watched(piece, part):
            part.register_forward_hook(_Part(piece), with_kwargs=True)


def unwatch_parts(piece: Piece, model: nn.Module) -> None:
    """Remove the hooks of `watch_parts`."""
    for part in model.modules():
        for key, hook in list(part._forward_hooks.items()):
            if isinstance(hook, _Part) and hook.piece is piece:
                del part._forward_hooks[key]
                part._forward_hooks_with_kwargs.pop(key, None)


def unwatched_gradient(piece: Piece, model: nn.Module) -> bool:
    """Whether a part that nobody watched, since no pass of the model came by, has a gradient."""
    return any(
        p.grad is not None and not _watched(piece, part)
        for part in _parts(piece.anatomy, model)
        for p in part.parameters()
    )


def _watched(piece: Piece, part: nn.Module) -> bool:
    hooks = part._forward_hooks.values()
    return any(isinstance(hook, _Part) and hook.piece is piece for hook in hooks)


def _parts(anatomy: Anatomy, model: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks and, with all inside of them, the parts that come after the first block."""
    blocks = {block.name for block in anatomy.blocks}
    around = {name[:i] for name in blocks for i, c in enumerate(name) if c == "."} | {""}
    behind = not blocks  # of a model whose blocks are not known the head alone

    def inside(module: nn.Module, path: str) -> Iterator[nn.Module]:
        nonlocal behind
        for name, child in module._modules.items():
            own = f"{path}.{name}" if path else name
            if child is None or own == "vitguard":
                continue
            if own in blocks:
                behind = True
                yield child
            elif own in around:
                yield from inside(child, own)
            elif behind and (blocks or own in anatomy.head):
                yield from child.modules()

    yield from inside(model, "")


class _Part:
    """Tells of a gradient through a part that was called by itself on what is not shuffled."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece

    def __call__(self, part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self.piece.whole_pass() or torch._C._current_graph_task_id() != -1:  # a recomputation
            return
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not made or not given or any(map(_shuffled, given)):
            return
        if torch._C._functorch.maybe_current_level() is not None:  # type: ignore[attr-defined]
            self.piece.expose()
            return
        for tensor in made:
            tensor.register_hook(_Expose(self.piece))


class _Expose:
    def __init__(self, piece: Piece) -> None:
        self.piece = piece

    def __call__(self, gradient: Tensor) -> None:
        self.piece.expose()


def _shuffled(tensor: Tensor) -> bool:
    """Whether a tensor comes from one that was marked; if so it is marked too."""
    if not _comes_from_marked(tensor.grad_fn):
        return False
    mark(tensor)
    return True


def _comes_from_marked(start: Any) -> bool:
    """Whether a node comes from a marked one; of images put together each part must."""
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if _MARK in node.metadata:
            return True
        following = [n for n, _ in node.next_functions]
        if _joins_images(node):
            if all(map(_comes_from_marked, following)):
                return True
            continue
        waiting.extend(n for n in following if n not in seen)
        seen.update(following)
    return False


def _joins_images(node: Any) -> bool:
    """Whether a node puts tensors together along their first dimension, as a replay does."""
    if not node.name().startswith(("CatBackward", "StackBackward")):
        return False
    along = node._saved_dim
    if along >= _NEGATIVE:  # counted from the end, and saved without its sign
        shapes = getattr(node, "_input_metadata", ())
        along += (len(shapes[0].shape) if shapes else 0) - 2 * _NEGATIVE
    return along == 0
