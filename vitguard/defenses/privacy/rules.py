"""What each operation means for the record: one rule an operation, found by its name.

A rule is called when an operation takes a root together with tensors that hold the examples. What
has no rule is computed one example at a time, which is exact and slow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from vitguard.defenses.privacy import functions
from vitguard.defenses.privacy.tape import Root, Tape
from vitguard.errors import Incompatible

__all__ = ["RULES", "expand_rule", "one_by_one", "tensors_in"]

Rule = Callable[..., Any]

_BROADCASTING = {
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "rsub", "pow",
    "where", "maximum", "minimum", "lerp", "addcmul", "addcdiv", "fmax", "fmin",
}  # fmt: skip
_BROADCASTING |= {f"{name}_" for name in _BROADCASTING}
_BROADCASTING |= {
    f"__{prefix}{name}__"
    for prefix in ("", "r", "i")
    for name in ("add", "sub", "mul", "truediv", "pow")
}  # fmt: skip


_MIXING = {"batch_norm", "sync_batch_norm", "__setitem__", "index_put"}


def tensors_in(values: Iterable[Any]) -> Iterable[Tensor]:
    """Yield the tensors among arguments, one level of lists deep."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (v for v in value if isinstance(v, Tensor))


def _refuse(tape: Tape, what: str, roots: Iterable[Tensor]) -> Incompatible:
    names = ", ".join(tape.name(r).replace("|", ", ") for r in roots)
    return Incompatible(
        f"Expected an operation whose examples lie along the first dimension, got {what} with "
        f"{names}. Differential privacy cannot follow it: freeze {names} or change the layer."
    )


def _rows(tape: Tape, x: Tensor, what: str, roots: Iterable[Tensor]) -> int:
    if x.dim() < 1 or x.shape[0] % tape.batch:
        raise _refuse(tape, f"{what} on shape {tuple(x.shape)}", roots)
    return x.shape[0]


def _to_rows(tape: Tape, root: Tensor, shape: torch.Size, rule: str) -> Tensor:
    """Return a root so that it broadcasts to `shape` with a row for each of shape[0]."""
    rows = _shape_rows(tape, shape, rule, root)
    entry = tape.enter(root, rule)
    if root.dim() == len(shape) and root.shape[0] != 1:
        if entry.source is None or root.shape[0] != rows:
            raise _refuse(tape, f"{rule} to shape {tuple(shape)}", [root])
        return functions.slots(tape, entry)
    if root.dim() > len(shape):
        raise _refuse(tape, f"{rule} to shape {tuple(shape)}", [root])
    missing = len(shape) - root.dim()
    return functions.lift(tape, entry, (1,) * missing + tuple(root.shape), rows)


def _shape_rows(tape: Tape, shape: torch.Size, rule: str, root: Tensor) -> int:
    if not shape or shape[0] % tape.batch:
        raise _refuse(tape, f"{rule} to shape {tuple(shape)}", [root])
    return shape[0]


def _broadcast(tape: Tape, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """Elementwise operations: give each root a row for each example, then do as before."""
    name = func.__name__
    shape = torch.broadcast_shapes(*(t.shape for t in tensors_in((*args, *kwargs.values()))))

    def per_row(value: Any) -> Any:
        return _to_rows(tape, value, shape, name) if _is_root(value, tape) else value

    return func(*map(per_row, args), **{k: per_row(v) for k, v in kwargs.items()})


def _is_root(value: Any, tape: Tape) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and tape.is_root(value)


def _split(tape: Tape, value: Tensor | None, rule: str) -> tuple[Tensor | None, Root | None]:
    """Return what a recorded operation computes with, and the root to record under."""
    if value is None or not tape.is_root(value):
        return value, None
    root = tape.enter(value, rule)
    return root.leaf, root


def _low_precision(x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _linear(
    tape: Tape,
    func: Any,
    args: tuple,
    kwargs: dict,
    *,
    names: tuple[str, ...] = ("input", "weight", "bias"),
) -> Any:
    given = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if not isinstance(x, Tensor) or tape.is_root(x) or x.dim() < 2:
        return one_by_one(tape, func, args, kwargs)
    _rows(tape, x, "linear", [t for t in (weight, bias) if _is_root(t, tape)])
    weight, weight_root = _split(tape, weight, "linear")
    bias, bias_root = _split(tape, bias, "linear bias")
    assert weight is not None
    return functions.linear(tape, _low_precision(x), weight, bias, (weight_root, bias_root))


def _matmul(tape: Tape, func: Any, args: tuple, kwargs: dict) -> Any:
    if len(args) == 2 and not kwargs:
        x, weight = args if func.__name__ != "__rmatmul__" else args[::-1]
        if tape.is_root(weight) and weight.dim() == 2 and not tape.is_root(x) and x.dim() >= 2:
            turned = tape.alias(weight).mT
            tape.add_computed(turned, tape.name(weight))
            return _linear(tape, F.linear, (x, turned), {})
    return one_by_one(tape, func, args, kwargs)


def _conv2d(
    tape: Tape,
    func: Any,
    args: tuple,
    kwargs: dict,
) -> Any:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= dict(zip(names, args, strict=False)) | kwargs
    x, padding = given["input"], given["padding"]
    padding = 0 if padding == "valid" else padding
    if tape.is_root(x) or isinstance(padding, str) or x.dim() != 4:
        return one_by_one(tape, func, args, kwargs)
    roots = [t for t in (given["weight"], given["bias"]) if _is_root(t, tape)]
    _rows(tape, x, "conv2d", roots)
    weight, weight_root = _split(tape, given["weight"], "conv2d")
    bias, bias_root = _split(tape, given["bias"], "conv2d bias")
    assert weight is not None
    geometry = (_pair(given["stride"]), _pair(padding), _pair(given["dilation"]), given["groups"])
    x = _low_precision(x)
    return functions.convolve(tape, x, weight, bias, (weight_root, bias_root), geometry)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else [*value] * (2 if len(value) == 1 else 1)


def _layer_norm(tape: Tape, func: Any, args: tuple, kwargs: dict) -> Any:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = {"weight": None, "bias": None, "eps": 1e-5}
    given |= dict(zip(names, args, strict=False)) | kwargs
    x, shape = given["input"], tuple(given["normalized_shape"])
    if tape.is_root(x) or x.dim() <= len(shape):
        return one_by_one(tape, func, args, kwargs)
    _rows(tape, x, "layer_norm", [t for t in (given["weight"], given["bias"]) if _is_root(t, tape)])
    weight, weight_root = _split(tape, given["weight"], "layer_norm")
    bias, bias_root = _split(tape, given["bias"], "layer_norm bias")
    reference = next(t for t in (weight, bias) if t is not None)
    roots = (weight_root, bias_root)
    return functions.layer_norm(
        tape, x.to(reference.dtype), shape, weight, bias, roots, given["eps"]
    )


def _rms_norm(tape: Tape, func: Any, args: tuple, kwargs: dict) -> Any:
    names = ("input", "normalized_shape", "weight", "eps")
    given: dict[str, Any] = {"eps": None} | dict(zip(names, args, strict=False)) | kwargs
    if tape.is_root(given["input"]):
        return one_by_one(tape, func, args, kwargs)
    normal = func(given["input"], given["normalized_shape"], None, given["eps"])
    return _broadcast(tape, torch.mul, (normal, given["weight"]), {})


def _attention(tape: Tape, func: Any, args: tuple, kwargs: dict) -> Any:
    """Scaled dot-product attention whose additive bias is a root."""
    query = args[0] if args else kwargs["query"]
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    others = [t for t in tensors_in((*args, *kwargs.values())) if t is not mask]
    if not _is_root(mask, tape) or any(tape.is_root(t) for t in others) or query.dim() != 4:
        return one_by_one(tape, func, args, kwargs)
    mask = _to_rows(tape, mask, query.shape, "attention bias")
    if len(args) > 3:
        return func(*args[:3], mask, *args[4:], **kwargs)
    return func(*args, **{**kwargs, "attn_mask": mask})


def _join(tape: Tape, func: Any, args: tuple, kwargs: dict) -> Any:
    """Concatenation: each root must have the rows of the examples already."""
    parts, *rest = args
    holders = [t for t in parts if tape.holds_examples(t)]
    dim = rest[0] if rest else kwargs.get("dim", kwargs.get("axis", 0))
    if dim in (0, -max(t.dim() for t in holders)):
        raise _refuse(tape, "a join along the examples", filter(tape.is_root, parts))

    def with_rows(part: Tensor) -> Tensor:
        if not tape.is_root(part):
            return part
        return _to_rows(tape, part, holders[0].shape, func.__name__)

    return func([with_rows(p) for p in parts], *rest, **kwargs)


def _assign(tape: Tape, func: Any, args: tuple, kwargs: dict) -> Any:
    """`x[index] = root`: the index must keep the examples first."""
    target, index, value = args
    if not tape.is_root(value) or tape.is_root(target):
        raise _refuse(tape, "an assignment", filter(tape.is_root, tensors_in(args)))
    target[index] = _to_rows(tape, value, target[index].shape, "assignment")
    return None


def expand_rule(tape: Tape, func: Any, args: tuple, kwargs: dict) -> Tensor | None:
    """`token.expand(batch, -1, -1)` and its like: give the token a row for each example."""
    token, *sizes = args
    name = func.__name__
    if name == "expand_as":
        sizes = list(sizes[0].shape)
    elif kwargs or not sizes:
        return None
    elif len(sizes) == 1 and isinstance(sizes[0], tuple | list | torch.Size):
        sizes = list(sizes[0])
    if not isinstance(token, Tensor) or not tape.is_root(token) or sizes[0] != tape.batch:
        return None
    missing = len(sizes) - token.dim()
    if missing < 0 or (missing == 0 and token.shape[0] != 1):
        return None
    entry = tape.enter(token, name)
    lifted = functions.lift(tape, entry, (1,) * missing + tuple(token.shape), tape.batch)
    return lifted.repeat(1, *sizes[1:]) if name == "repeat" else lifted.expand(sizes)


def _multi_head(tape: Tape, func: Any, args: tuple, kwargs: dict) -> Any:
    """`nn.MultiheadAttention` in its packed form; tokens come first, examples second."""
    names = tuple(inspect.signature(func).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    q, k, v = (given[n] for n in ("query", "key", "value"))
    roots = [t for t in tensors_in(given.values()) if tape.is_root(t)]
    odd = ("bias_k", "bias_v", "static_k", "static_v", "key_padding_mask", "attn_mask")
    if (
        q.dim() != 3
        or any(given.get(n) is not None for n in odd)
        or given.get("add_zero_attn")
        or given.get("use_separate_proj_weight")
        or any(tape.is_root(t) for t in (q, k, v))
    ):
        raise _refuse(tape, "this form of multi_head_attention_forward", roots)
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    joined = _project(tape, (q, k, v), weight, bias)
    heads = given["num_heads"]
    b, tokens, width = joined[0].shape
    shaped = [t.reshape(b, t.shape[1], heads, width // heads).transpose(1, 2) for t in joined]
    dropout = given["dropout_p"] if given.get("training", True) else 0.0
    weights = None
    if given.get("need_weights", True):
        scores = shaped[0] @ shaped[1].mT * (width // heads) ** -0.5
        weights = F.dropout(scores.softmax(-1), dropout)
        mixed = weights @ shaped[2]
        weights = weights.mean(1) if given.get("average_attn_weights", True) else weights
    else:
        q, k, v = shaped
        causal = given.get("is_causal", False)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    mixed = mixed.transpose(1, 2).reshape(b, tokens, width)
    out = _maybe_linear(tape, mixed, given["out_proj_weight"], given["out_proj_bias"])
    return out.transpose(0, 1), weights


def _maybe_linear(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _is_root(weight, tape) or _is_root(bias, tape):
        return _linear(tape, F.linear, (x, weight, bias), {})
    return F.linear(x, weight, bias)


def _project(
    tape: Tape, inputs: tuple[Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """Return query, key and value projections, examples first."""
    q, k, v = (t.transpose(0, 1) for t in inputs)
    if inputs[0] is inputs[1] is inputs[2]:
        return list(_maybe_linear(tape, q, weight, bias).chunk(3, -1))

    def thirds(tensor: Tensor | None) -> list[Any]:
        if tensor is None or not tape.is_root(tensor):
            return [None] * 3 if tensor is None else list(tensor.chunk(3))
        parts = list(tape.alias(tensor).chunk(3))
        for part in parts:
            tape.add_computed(part, tape.name(tensor))
        return parts

    return [
        _maybe_linear(tape, x, w, b)
        for x, w, b in zip((q, k, v), thirds(weight), thirds(bias), strict=True)
    ]


def one_by_one(tape: Tape, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """Call an operation for each example with its own copy of the roots, and join the results."""
    everything = list(tensors_in((*args, *kwargs.values())))
    roots = [t for t in everything if tape.is_root(t)]
    name = getattr(func, "__name__", str(func))
    holders = [t for t in everything if tape.holds_examples(t)]
    in_place = name.endswith("_") and not name.startswith("__")
    if in_place or not holders or name in _MIXING:
        raise _refuse(tape, name, roots)
    rows = holders[0].shape[0] if holders[0].dim() else 0
    per = rows // tape.batch
    if not per or rows % tape.batch or any(t.dim() == 0 or t.shape[0] != rows for t in holders):
        raise _refuse(tape, name, roots)
    copies = {
        id(r): functions.lift(tape, tape.enter(r, f"{name} one by one"), (1, *r.shape), tape.batch)
        for r in {id(t): t for t in roots}.values()
    }
    holding = {id(t) for t in holders}

    def of(value: Any, i: int) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(of(v, i) for v in value)
        if id(value) in copies:
            return copies[id(value)][i]
        return value[i * per : (i + 1) * per] if id(value) in holding else value

    results = [
        func(*(of(a, i) for a in args), **{k: of(v, i) for k, v in kwargs.items()})
        for i in range(tape.batch)
    ]
    if not all(isinstance(r, Tensor) and r.dim() for r in results):
        raise _refuse(tape, name, roots)
    joined = torch.cat(results)
    with torch.no_grad():  # an operation that mixes examples gives something else one by one
        together = func(*args, **kwargs)
    tolerance = 1e-2 if joined.element_size() < 4 else 1e-4
    if joined.shape != together.shape or not torch.allclose(
        joined, together, rtol=tolerance, atol=tolerance * float(together.abs().max() + 1e-30)
    ):
        raise _refuse(tape, name, roots)
    return joined


RULES: dict[str, Rule] = dict.fromkeys(_BROADCASTING, _broadcast) | {
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "conv2d": _conv2d,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head,
    "cat": _join,
    "concat": _join,
    "concatenate": _join,
    "stack": _join,
    "__setitem__": _assign,
}
