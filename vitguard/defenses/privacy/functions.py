"""Differentiable operations whose backward pass records each example's parameter gradient.

Each returns the gradient of its examples as usual, and none of its parameters': that goes to the
tape. While the tape is `checking`, the plain parameter gradient is returned instead and nothing is
recorded; the engine compares the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitguard.defenses.privacy.tape import (
    Products,
    Root,
    Samples,
    Slots,
    Tape,
    full_precision,
    prefer_products,
)
from vitguard.errors import Unprotected

__all__ = ["REMADE", "convolve", "layer_norm", "lift", "linear", "note", "slots"]

REMADE = ("gelu", "silu")
"""Activations that a linear layer makes again from their input, which autograd keeps anyway."""


def linear(
    tape: Tape,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    roots: tuple[Root | None, Root | None],
) -> Tensor:
    """Return `x @ weight.T + bias`, book-kept; x has shape (k * batch, ..., columns)."""
    made = getattr(x, "_vitguard_made", None)
    return _Linear.apply(x, weight, bias, tape, roots, made)  # type: ignore[return-value]


def note(out: Tensor, func: Callable[..., Tensor], args: tuple, kwargs: dict) -> None:
    """Remember how an activation was made, for a linear layer that would keep it.

    What pays for a block's formed gradients during the backward pass: one activation a block less.
    """
    if args and isinstance(args[0], Tensor) and args[0].requires_grad:
        source, *rest = args
        made = (lambda x: func(x, *rest, **kwargs)), source, out._version
        out._vitguard_made = made  # type: ignore[attr-defined]


def convolve(
    tape: Tape,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    roots: tuple[Root | None, Root | None],
    geometry: tuple[Any, Any, Any, int],
) -> Tensor:
    """Return a 2-D convolution, book-kept; geometry is (stride, padding, dilation, groups)."""
    return _Convolution.apply(x, weight, bias, tape, roots, geometry)  # type: ignore[return-value]


def layer_norm(
    tape: Tape,
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    roots: tuple[Root | None, Root | None],
    eps: float,
) -> Tensor:
    """Return a layer normalisation, book-kept."""
    return _LayerNorm.apply(x, weight, bias, tape, roots, shape, eps)  # type: ignore[return-value]


def lift(tape: Tape, root: Root, view: tuple[int, ...], rows: int) -> Tensor:
    """Return the root, viewed as (1, ...), with a row for each example; no memory is copied."""
    return _Lift.apply(root.leaf, tape, root, view, rows)  # type: ignore[return-value]


def slots(tape: Tape, root: Root) -> Tensor:
    """Return a root that has rows for each example already."""
    return _Slots.apply(root.leaf, tape, root)  # type: ignore[return-value]


def _recording(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a backward pass in the precision of its tensors, also inside an autocast block.

    Raises:
        Unprotected: The step that the pass belongs to was taken, or its batch was left out.
    """

    @functools.wraps(backward)
    def exact(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.tape.closed:
            raise Unprotected(
                "Expected a backward pass of the batch that is due, got one of a batch whose step "
                "was taken or that was left out: its gradient would be lost. Add up the losses of "
                "a batch and call backward before its step."
            )
        with full_precision(gradients[0].device):
            return backward(ctx, *gradients)

    return exact


def _record_matrix(root: Root, x: Tensor, g: Tensor) -> None:
    """Record `g[i].T @ x[i]`: as factors where that is cheaper and nothing else uses the root."""
    dtype = root.leaf.dtype
    # Detached: inputs that knew their graph would keep it, and the tape, alive in a cycle.
    products = Products(x.detach().to(dtype), g.detach().to(dtype), root.leaf.shape)
    if root.entries == 1 and prefer_products(x.shape[1], g.shape[2], x.shape[2]):
        root.uses.append(products)
    else:
        root.uses.append(Samples(products.samples()))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, tape: Tape, roots: Any, made: Any
    ) -> Tensor:
        ctx.tape, ctx.roots, ctx.remake = tape, roots, None
        ctx.x_dtype = x.dtype
        kept: Tensor | None = x if roots[0] is not None else None
        if kept is not None and made is not None and made[2] == x._version:
            ctx.remake, kept, _ = made
        ctx.save_for_backward(kept, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    @_recording
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        tape, (weight_root, bias_root) = ctx.tape, ctx.roots
        remake = ctx.remake or (lambda kept: kept)
        gx = gw = gb = None
        if tape.checking:
            if weight_root is not None:
                gw = g.flatten(0, -2).mT @ remake(x.detach()).to(g.dtype).flatten(0, -2)
            if bias_root is not None:
                gb = g.flatten(0, -2).sum(0)
            if ctx.needs_input_grad[0]:
                gx = torch.matmul(g, weight.to(g.dtype)).to(ctx.x_dtype)
            return gx, gw, gb, None, None, None
        rows = g.reshape(tape.batch, -1, g.shape[-1])
        live = _live_positions(tape, rows)
        rows = rows if live is None else rows[:, live]
        if weight_root is not None:
            kept = x.detach().reshape(tape.batch, -1, x.shape[-1])
            x = remake(kept if live is None else kept[:, live])
            _record_matrix(weight_root, x, rows)
        del x  # before its gradient takes as much memory again
        if bias_root is not None:
            bias_root.uses.append(Samples(rows.sum(1, dtype=bias_root.leaf.dtype)))
        if ctx.needs_input_grad[0] and live is None:
            gx = torch.matmul(g, weight.to(g.dtype)).to(ctx.x_dtype)
        elif ctx.needs_input_grad[0]:
            gx = g.new_zeros((*g.shape[:-1], weight.shape[1]), dtype=ctx.x_dtype)
            gx.view(tape.batch, -1, gx.shape[-1])[:, live] = (rows @ weight.to(g.dtype)).to(gx)
        return gx, None, None, None, None, None


def _live_positions(tape: Tape, rows: Tensor) -> Tensor | None:
    """Return the positions where any example has a gradient; None where most have one.

    In the last block of a model that reads its class token, only that token has. Backward meets
    such layers first, so nobody looks any more after the first one that is not.
    """
    if not tape.thin or rows.shape[1] == 1:
        return None
    if not bool(rows[0, -1].any()):
        live = rows.any(2).any(0).nonzero()[:, 0]
        if 2 * len(live) <= rows.shape[1]:
            return live
    tape.thin = False
    return None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, tape: Tape, roots: Any, geometry: Any
    ) -> Tensor:
        ctx.tape, ctx.roots, ctx.geometry = tape, roots, geometry
        ctx.save_for_backward(x, weight)
        stride, padding, dilation, groups = geometry
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    @_recording
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (g,) = gradients
        x, weight = ctx.saved_tensors
        tape, (weight_root, bias_root) = ctx.tape, ctx.roots
        stride, padding, dilation, groups = ctx.geometry
        checking = tape.checking
        gx, gw, gb = torch.ops.aten.convolution_backward(
            g, x.to(g.dtype), weight.to(g.dtype), [weight.shape[0]], stride, padding, dilation,
            False, [0, 0], groups,
            [ctx.needs_input_grad[0], checking and weight_root is not None,
             checking and bias_root is not None],
        )  # fmt: skip
        if gx is not None:
            gx = gx.to(x.dtype)
        if checking:
            return gx, gw, gb, None, None, None
        # Reshapes by index, never by memory: channels_last tensors come with other strides.
        outputs = g.reshape(tape.batch, -1, *g.shape[1:]).movedim(2, -1).flatten(1, -2)
        if weight_root is not None:
            columns = _columns(x, weight, ctx.geometry)
            columns = columns.reshape(tape.batch, -1, columns.shape[-1])
            if groups == 1:
                _record_matrix(weight_root, columns, outputs)
            else:
                _record_groups(weight_root, columns, outputs, groups)
        if bias_root is not None:
            bias_root.uses.append(Samples(outputs.sum(1, dtype=bias_root.leaf.dtype)))
        return gx, None, None, None, None, None


def _columns(x: Tensor, weight: Tensor, geometry: tuple[Any, Any, Any, int]) -> Tensor:
    """Return what each output position saw, shape (images, positions, channels * kernel)."""
    stride, padding, dilation, _ = geometry
    kernel = tuple(weight.shape[2:])
    high, wide = kernel
    n, channels, height, width = x.shape
    tiles = kernel == tuple(stride) and not any(padding) and height % high == width % wide == 0
    if tiles:
        cut = x.reshape(n, channels, height // high, high, width // wide, wide)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * high * wide)
    return F.unfold(x.contiguous(), kernel, dilation, padding, stride).mT


def _record_groups(root: Root, columns: Tensor, outputs: Tensor, groups: int) -> None:
    b, positions, _ = columns.shape
    x = columns.reshape(b, positions, groups, -1)
    g = outputs.reshape(b, positions, groups, -1)
    formed = torch.einsum("btgp,btgd->bgpd", g, x.to(g.dtype))
    root.uses.append(Samples(formed.reshape(b, *root.leaf.shape).to(root.leaf.dtype)))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, tape: Tape, roots: Any, shape: Any, eps: float
    ) -> Tensor:
        ctx.tape, ctx.roots, ctx.shape = tape, roots, shape
        out, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        return out

    @staticmethod
    @once_differentiable
    @_recording
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (g,) = gradients
        x, weight, mean, scale = ctx.saved_tensors
        tape, (weight_root, bias_root) = ctx.tape, ctx.roots
        checking = tape.checking
        g = g.to(x.dtype)
        if not checking:
            _record_norm(tape, ctx.roots, ctx.shape, g, (x, mean, scale))
        gx, gw, gb = torch.ops.aten.native_layer_norm_backward(
            g, x, ctx.shape, mean, scale, weight, weight,
            [ctx.needs_input_grad[0], checking and weight_root is not None,
             checking and bias_root is not None],
        )  # fmt: skip
        return gx, gw if checking else None, gb if checking else None, None, None, None, None


def _record_norm(
    tape: Tape,
    roots: tuple[Root | None, Root | None],
    shape: tuple[int, ...],
    g: Tensor,
    normal: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Record scale and shift; the normalised input is made here and dropped at once."""
    weight_root, bias_root = roots
    if weight_root is not None:
        x, mean, scale = normal
        product = torch.sub(x, mean).mul_(scale).mul_(g)
        weight_root.uses.append(Samples(product.reshape(tape.batch, -1, *shape).sum(1)))
        del product
    if bias_root is not None:
        bias_root.uses.append(Samples(g.reshape(tape.batch, -1, *shape).sum(1)))


class _Lift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, tape: Tape, root: Root, view: Any, rows: int) -> Tensor:
        ctx.tape, ctx.root = tape, root
        return leaf.view(view).expand(rows, *view[1:])

    @staticmethod
    @once_differentiable
    @_recording
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (g,) = gradients
        leaf = ctx.root.leaf
        if ctx.tape.checking:
            return g.sum(0).view(leaf.shape), None, None, None, None
        per_example = g.reshape(ctx.tape.batch, -1, *g.shape[1:]).sum(1)
        ctx.root.uses.append(Samples(per_example.reshape(-1, *leaf.shape)))
        return None, None, None, None, None


class _Slots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, tape: Tape, root: Root) -> Tensor:
        ctx.tape, ctx.root = tape, root
        return leaf.view_as(leaf)

    @staticmethod
    @once_differentiable
    @_recording
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (g,) = gradients
        if ctx.tape.checking:
            return g, None, None
        ctx.root.uses.append(Slots(g))
        return None, None, None
