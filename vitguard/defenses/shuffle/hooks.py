"""The hooks of a patch shuffle: picklable, silent in eval mode, outside compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from vitguard.defenses.base import Installed
from vitguard.defenses.shuffle.parts import watch_parts
from vitguard.defenses.shuffle.settings import ShuffleSettings
from vitguard.defenses.steps import watch_steps
from vitguard.errors import Incompatible, Unprotected
from vitguard.vit import Anatomy

__all__ = ["Hooked", "hook"]


class Hooked(Installed):
    """What the hooks ask of an installed shuffle."""

    anatomy: Anatomy
    settings: ShuffleSettings

    def expose(self) -> None:
        """Note that a gradient was taken through a pass that did not shuffle."""
        raise NotImplementedError

    def enter(self) -> None:
        """Note that a pass of the whole model begins in this thread."""
        raise NotImplementedError

    def exit(self) -> None:
        """Note that it has ended, or broken off."""
        raise NotImplementedError

    def whole_pass(self) -> bool:
        """Whether a pass of the whole model runs in this thread."""
        raise NotImplementedError

    def begin(self, tokens: Tensor, grid: tuple[int, int]) -> None:
        """Take the embedded patches of a forward."""
        raise NotImplementedError

    def place(self, sequence: Tensor) -> Tensor:
        """Return the embedded sequence with the shuffled patches in it."""
        raise NotImplementedError

    def require_placed(self) -> None:
        """Raise Unprotected if the patches of a whole forward went round the placing."""
        raise NotImplementedError

    def remember(self, rows: Tensor) -> None:
        """Take the position embedding of this forward."""
        raise NotImplementedError

    def leave(self, outputs: Tensor) -> None:
        """Take the last block's output."""
        raise NotImplementedError

    def finish(self) -> Tensor | None:
        """Return the losses of DAL, where there are some."""
        raise NotImplementedError


def hook(piece: Hooked, model: nn.Module) -> Iterator[Any]:
    """Register the hooks one by one and yield their handles."""
    anatomy = piece.anatomy
    yield model.register_forward_pre_hook(_Root(piece))
    yield model.register_forward_hook(_Passed(piece))
    yield model.register_forward_hook(_Left(piece), always_call=True)
    if anatomy.blocks:
        yield model.get_submodule(anatomy.blocks[-1].name).register_forward_hook(_Passing(piece))
    stage = model.get_submodule(anatomy.patch_stage)
    if anatomy.positions is None:
        yield stage.register_forward_hook(_EmbedAndPlace(piece))
    else:
        assert anatomy.embedded is not None
        yield stage.register_forward_hook(_Embed(piece))
        yield model.get_submodule(anatomy.embedded).register_forward_pre_hook(_Place(piece))
    if piece.settings.dal == "positions":
        path, _, attribute = str(anatomy.positions).rpartition(".")
        yield model.get_submodule(path).register_forward_pre_hook(_Rows(piece, attribute))
    if piece.settings.dal == "tokens":
        last = model.get_submodule(anatomy.blocks[-1].name)
        yield last.register_forward_hook(_Outputs(piece))
    if piece.settings.dal != "none":
        yield model.register_forward_hook(_Finish(piece))


class _Hook:
    """Does nothing in eval mode; in training a compiled model breaks its graph here."""

    def __init__(self, piece: Hooked) -> None:
        self.piece = piece

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        return self.act(module, args, output) if self.piece.training else None

    def act(self, module: nn.Module, args: Any, output: Any) -> Any:
        raise NotImplementedError


class _Placing(_Hook):
    """Also notes gradients that go round the shuffle, so that `seal` can refuse them."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        if self.piece.training:
            return self.act(module, args, output)
        sequence = args[0] if output is None else output
        _watch(self.piece, sequence[0] if isinstance(sequence, tuple) else sequence)
        return None


class _Passing(_Hook):
    """Notes them behind the placing too: where all before it is frozen, they never reach it."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        if not self.piece.training and torch.is_grad_enabled():
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    _watch(self.piece, leaf)
        return None


class _Passed(_Passing):
    """Ends a pass of the whole model, in which the patches must have found their places."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        if not self.piece.training:
            return super().__call__(module, args, output)
        return _Hook.__call__(self, module, args, output)

    @torch.compiler.disable
    def act(self, module: nn.Module, args: Any, output: Any) -> None:
        self.piece.require_placed()


def _watch(piece: Hooked, tensor: Tensor) -> None:
    """Note it if a gradient comes by a tensor of a pass that did not shuffle."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        if torch.compiler.is_compiling():
            piece.expose()
        else:
            tensor.register_hook(_Expose(piece))


class _Expose:
    def __init__(self, piece: Hooked) -> None:
        self.piece = piece

    def __call__(self, gradient: Tensor) -> None:
        self.piece.expose()


class _Root(_Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        if not self.piece.training:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self.begin(module)
            return None
        return super().__call__(module, args, output)

    @torch.compiler.disable
    def act(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.jit.is_tracing() or torch._C._functorch.maybe_current_level() is not None:  # type: ignore[attr-defined]
            raise Incompatible(
                "Expected a training pass that runs as it is, since each draws a permutation of "
                "its own, got one inside a transform of torch.func or a trace. Train with "
                "loss.backward(), and trace the model in eval mode."
            )
        self.begin(module)

    def begin(self, model: nn.Module) -> None:
        watch_steps(self.piece, model)
        watch_parts(self.piece, model)
        self.piece.enter()


class _Left(_Hook):
    """Ends a pass of the whole model, also one that broke off."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        if not self.piece.training:
            if not torch.compiler.is_compiling():
                self.piece.exit()
            return None
        return super().__call__(module, args, output)

    @torch.compiler.disable
    def act(self, module: nn.Module, args: Any, output: Any) -> None:
        self.piece.exit()


class _Embed(_Hook):
    @torch.compiler.disable
    def act(self, module: nn.Module, args: Any, output: Any) -> None:
        tokens, _ = _as_sequence(output, self.piece.anatomy)
        self.piece.begin(tokens, _grid(args[0], tokens.shape[1], self.piece.anatomy))


class _EmbedAndPlace(_Placing):
    @torch.compiler.disable
    def act(self, module: nn.Module, args: Any, output: Any) -> Any:
        tokens, restore = _as_sequence(output, self.piece.anatomy)
        self.piece.begin(tokens, _grid(args[0], tokens.shape[1], self.piece.anatomy))
        return restore(self.piece.place(tokens))


class _Place(_Placing):
    @torch.compiler.disable
    def act(self, module: nn.Module, args: Any, output: Any) -> Any:
        return (self.piece.place(args[0]), *args[1:])


class _Rows(_Hook):
    def __init__(self, piece: Hooked, attribute: str) -> None:
        super().__init__(piece)
        self.attribute = attribute

    @torch.compiler.disable
    def act(self, module: nn.Module, args: Any, output: Any) -> None:
        self.piece.remember(getattr(module, self.attribute))


class _Outputs(_Hook):
    @torch.compiler.disable
    def act(self, module: nn.Module, args: Any, output: Any) -> None:
        self.piece.leave(output[0] if isinstance(output, tuple) else output)


class _Finish(_Hook):
    @torch.compiler.disable
    def act(self, module: nn.Module, args: Any, output: Any) -> Any:
        losses = self.piece.finish()
        if losses is None or not (distributed.is_available() and distributed.is_initialized()):
            return None
        return _reaching(output, losses)


def _reaching(output: Any, losses: Tensor) -> Any:
    """Return the same output, from which a search of its graph comes upon `losses` too.

    DistributedDataParallel with `find_unused_parameters` takes what that search does not meet for
    unused. The head of DAL is met by the loss alone, outside of the model's output.
    """
    leaves, tree = tree_flatten(output)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaves[i] = _Reaching.apply(leaf, losses)
            break
    return tree_unflatten(leaves, tree)


class _Reaching(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, losses: Tensor) -> Tensor:
        return output.clone()  # a view could not be changed in place, as trainers scale losses

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _as_sequence(output: Any, anatomy: Anatomy) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return a patch embedding's output as (batch, patches, width), and the way back."""
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        # transformers' Swin and Data2Vec: the tokens, then how many rows and columns they have
        tokens, restore = _as_sequence(output[0], anatomy)
        rest = output[1:]
        return tokens, lambda placed: (restore(placed), *rest)
    if isinstance(output, Tensor) and output.dim() == 3:
        return output, lambda tokens: tokens
    if not isinstance(output, Tensor) or output.dim() != 4:
        shape = tuple(getattr(output, "shape", ()))
        raise Unprotected(
            f"Expected a tensor of 3 or 4 dimensions from {anatomy.patch_stage}, got "
            f"{type(output).__name__} of shape {shape}."
        )
    if anatomy.patch_stage == anatomy.patch or output.shape[-1] != anatomy.width:
        size = output.shape[-2:]  # the convolution itself: channels first
        return output.flatten(2).mT, lambda tokens: tokens.mT.unflatten(2, size)
    size = output.shape[1:3]
    return output.flatten(1, 2), lambda tokens: tokens.unflatten(1, size)


def _grid(images: Tensor, patches: int, anatomy: Anatomy) -> tuple[int, int]:
    """Return patches per column and per row of these images; they may be of any size."""
    high, wide = (
        -(-size // patch) for size, patch in zip(images.shape[-2:], anatomy.patch_size, strict=True)
    )
    if high * wide == patches:
        return high, wide
    if anatomy.patches == patches:
        return anatomy.grid
    raise Unprotected(
        f"Expected {high} x {wide} patches of {tuple(images.shape)}, got {patches}: it is not "
        "known which of them are neighbours."
    )
